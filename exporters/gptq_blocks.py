"""Frozen codes ↔ the arrays of GPTQ folders (AutoGPTQ's layout, "gptq" or v1), weight for weight. Needs numpy only.

A matrix [out, in] is `qweight` int32 [in · bits / 32, out], each word holding consecutive inputs of one output from the
lowest bits up; `qzeros` int32 [groups, out · bits / 32], each word holding consecutive outputs; `scales` float16
[groups, out]; and `g_idx` int32 [in], the group of each input. `w = scale · (code − zero-point)`.

v1 stores each zero-point less 1, and readers disagree about −1: GPTQModel adds 1 to whole words, so that a field of all
ones carries into its neighbour; vLLM's kernels add 1 to the field and get 2^bits; the model builder of
onnxruntime-genai wraps around. So a zero-point of 0 is not stored: zero-point and codes of its group move up by one,
which are the same weights. Where a code of the group is the highest already that cannot be, and such a matrix is
refused. (v2 stores zero-points as they are, but the model builder takes it for v1.) Checked against gptqmodel 7.7.0 and
onnxruntime-genai 0.18.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from optrot_edge.checkpoint import QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.exporters.onnx_blocks import from_bytes, to_bytes
from optrot_edge.gridspec import GPTQ_BITS, GPTQ_GROUPS, GridSpec


def check_grid(spec: GridSpec, name: str = "tensor") -> None:
    """InputError unless the readers of GPTQ folders compute with `spec`."""
    if (spec.kind not in ("symmetric", "zero") or spec.subscales or spec.bits not in GPTQ_BITS
            or spec.group_size not in GPTQ_GROUPS or spec.scale_dtype != "float16"):
        raise InputError(f"{name} is on grid {spec.name}, which GPTQ's format lacks; quantise to "
                         "int{2,4,8}-g{16|32|64|128|256}-{sym|zero}-f16, such as int4-g128-sym-f16")


def check_shape(shape: tuple[int, ...], spec: GridSpec, name: str = "tensor") -> None:
    """InputError unless a matrix [out, in] divides into groups and words."""
    rows, columns = shape
    if columns % spec.group_size:
        fitting = [str(group) for group in GPTQ_GROUPS if columns % group == 0]
        raise InputError(f"{name}: rows of {columns} weights do not divide into groups of {spec.group_size} "
                         f"({spec.name}); choose {'groups of ' + ' or '.join(fitting) if fitting else 'f16'}")
    per_word = 32 // spec.bits
    if rows % per_word or columns % per_word:
        raise InputError(f"{name} is {rows} by {columns}, and GPTQ's format needs multiples of {per_word} at "
                         f"{spec.bits} bits; choose f16 for it")


def pack(tensor: QuantizedTensor, name: str = "tensor") -> dict[str, np.ndarray]:
    """The arrays by the suffix of their name: "qweight", "qzeros", "scales" and "g_idx".

    Raises InputError for a grid or shape that the format lacks, damaged parts, and a zero-point of 0 that cannot move.
    """
    spec, (rows, columns) = tensor.spec, tensor.codes.shape
    check_grid(spec, name)
    check_shape(tensor.codes.shape, spec, name)
    groups = columns // spec.group_size
    if tensor.scales.shape != (rows, groups) or tensor.scales.dtype != np.float16:
        raise InputError(f"{name}: {spec.name} needs float16 scales {[rows, groups]}; the checkpoint is damaged")
    if spec.kind == "zero":
        if (tensor.offsets is None or tensor.offsets.shape != (rows, groups)
                or tensor.offsets.max(initial=0) >= spec.levels):
            raise InputError(f"{name}: {spec.name} needs zero-points {[rows, groups]} below {spec.levels}; "
                             "the checkpoint is damaged")
        tensor = lift_zeros(tensor, name)
        zeros = tensor.offsets
    else:
        zeros = np.full((rows, groups), spec.levels // 2, np.uint8)
    return {"qweight": np.ascontiguousarray(_to_words(tensor.codes, spec).T),
            "qzeros": _to_words(np.ascontiguousarray(zeros.T) - np.uint8(1), spec),
            "scales": np.ascontiguousarray(tensor.scales.T), "g_idx": _group_of(columns, spec)}


def unpack(parts: dict[str, np.ndarray], spec: GridSpec) -> QuantizedTensor:
    """Inverse of `pack`, zero-points of 0 aside; ValueError when the arrays do not belong together."""
    columns = parts["qweight"].shape[0] * 32 // spec.bits
    codes = _from_words(np.ascontiguousarray(parts["qweight"].T), spec)
    zeros = np.ascontiguousarray((_from_words(parts["qzeros"], spec) + np.uint8(1)).T)
    if zeros.shape != parts["scales"].T.shape or not np.array_equal(parts["g_idx"], _group_of(columns, spec)):
        raise ValueError(f"zero-points {list(zeros.shape)}, scales {list(parts['scales'].shape)} and groups do not fit "
                         f"{spec.name}")
    if spec.kind == "symmetric":
        if (zeros != spec.levels // 2).any():
            raise ValueError(f"a zero-point off the middle of {spec.name}")
        zeros = None
    return QuantizedTensor(spec, codes, np.ascontiguousarray(parts["scales"].T), zeros)


def lift_zeros(tensor: QuantizedTensor, name: str = "tensor") -> QuantizedTensor:
    """The same weights with no zero-point of 0; InputError where a code would pass the highest."""
    lifted = tensor.offsets == 0
    if not lifted.any():
        return tensor
    groups = tensor.codes.reshape(*lifted.shape, -1)
    if (groups.max(-1)[lifted] >= tensor.spec.levels - 1).any():
        raise InputError(f"{name} ({tensor.spec.name}) has a group with zero-point 0 that needs all levels, which "
                         "GPTQ's readers do not agree on; quantise it to a symmetric grid such as "
                         f"int{tensor.spec.bits}-g{tensor.spec.group_size}-sym-f16")
    codes = groups + lifted[..., None].astype(np.uint8)
    return dataclasses.replace(tensor, codes=codes.reshape(tensor.codes.shape),
                               offsets=tensor.offsets + lifted.astype(np.uint8))


def _group_of(columns: int, spec: GridSpec) -> np.ndarray:
    """int32 [in]; the model builder needs it, although the groups lie in order."""
    return np.arange(columns, dtype=np.int32) // np.int32(spec.group_size)


def _to_words(integers: np.ndarray, spec: GridSpec) -> np.ndarray:
    """int32 [rows, n · bits / 32] of uint8 [rows, n], the first integer in the lowest bits."""
    return np.ascontiguousarray(to_bytes(integers, spec)).view("<i4")


def _from_words(words: np.ndarray, spec: GridSpec) -> np.ndarray:
    """Inverse of `_to_words`."""
    return from_bytes(np.ascontiguousarray(words, "<i4").view(np.uint8), spec)
