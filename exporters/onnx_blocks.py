"""Frozen codes ↔ the inputs of ONNX Runtime's MatMulNBits, bit for bit. Needs numpy only.

`com.microsoft.MatMulNBits` (ONNX Runtime's ContribOperators.md) computes `A Wᵀ` with `W = scale · (code − zero point)`
in blocks along a row: 2, 4 or 8 bits, blocks of a power of two from 16 on. Codes and zero-points fill bytes from the
lowest bits up; every row of zero-points begins a byte. Without zero-points the operator takes 2^(bits−1), the
"symmetric" grids' middle. With float32 activations and accuracy_level 0 or 1 the CPU kernel multiplies exactly what
`QuantizedTensor.decode` gives; level 4 rounds the activations to int8. Checked against onnxruntime 1.31.1.
"""

from __future__ import annotations

import numpy as np

from optrot_edge.checkpoint import QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.gridspec import ONNX_BITS, ONNX_GROUPS, GridSpec


def check_grid(spec: GridSpec, name: str = "tensor") -> None:
    """InputError unless MatMulNBits computes with `spec`."""
    if (spec.kind not in ("symmetric", "zero") or spec.subscales or spec.bits not in ONNX_BITS
            or spec.group_size not in ONNX_GROUPS or spec.scale_dtype not in ("float32", "float16")):
        raise InputError(f"{name} is on grid {spec.name}, which ONNX's MatMulNBits lacks; quantise to "
                         "int{2,4,8}-g{16|32|64|128|256}-{sym|zero}, with -f16 for float16 scales")


def pack(tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    """MatMulNBits' inputs by name: "B" uint8 [out, blocks, block · bits / 8], "scales" [out, blocks] and, for grids
    with zero-points, "zero_points" uint8 [out, ⌈blocks · bits / 8⌉].

    Raises InputError for a grid that the operator lacks, and codes or zero-points out of range.
    """
    spec, (rows, columns) = tensor.spec, tensor.codes.shape
    check_grid(spec)
    blocks = columns // spec.group_size
    if tensor.scales.shape != (rows, blocks) or tensor.scales.dtype != np.dtype(spec.scale_dtype):
        raise InputError(f"{spec.name} needs {spec.scale_dtype} scales {[rows, blocks]}; the checkpoint is damaged")
    packed = {"B": to_bytes(tensor.codes, spec).reshape(rows, blocks, -1), "scales": tensor.scales}
    if spec.kind == "zero":
        if tensor.offsets is None or tensor.offsets.shape != (rows, blocks):
            raise InputError(f"{spec.name} needs zero-points {[rows, blocks]}; the checkpoint is damaged")
        padding = -blocks % (8 // spec.bits)
        packed["zero_points"] = to_bytes(np.pad(tensor.offsets, ((0, 0), (0, padding))), spec)
    return packed


def unpack(parts: dict[str, np.ndarray], spec: GridSpec) -> QuantizedTensor:
    """Inverse of `pack`."""
    rows, blocks = parts["scales"].shape
    codes = from_bytes(parts["B"].reshape(rows, -1), spec)
    zeros = None if spec.kind != "zero" else np.ascontiguousarray(from_bytes(parts["zero_points"], spec)[:, :blocks])
    return QuantizedTensor(spec, codes, parts["scales"], zeros)


def to_bytes(integers: np.ndarray, spec: GridSpec) -> np.ndarray:
    """uint8 [rows, n · bits / 8] of uint8 [rows, n], the first integer in the lowest bits."""
    if integers.dtype != np.uint8 or integers.max(initial=0) >= spec.levels:
        raise InputError(f"{spec.name} codes and zero-points must be uint8 below {spec.levels}; "
                         "the checkpoint is damaged")
    per_byte = 8 // spec.bits
    parts = [integers[:, place::per_byte] << np.uint8(place * spec.bits) for place in range(per_byte)]
    return np.bitwise_or.reduce(parts)


def from_bytes(raw: np.ndarray, spec: GridSpec) -> np.ndarray:
    """Inverse of `to_bytes`."""
    parts = [raw >> np.uint8(shift) & np.uint8(spec.levels - 1) for shift in range(0, 8, spec.bits)]
    return np.stack(parts, axis=-1).reshape(len(raw), -1)
