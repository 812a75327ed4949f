"""Frozen codes ↔ MLX's affine arrays, bit for bit. Needs numpy only.

A row of codes is one stream of bits, each code with its lowest bit first, cut into little-endian uint32: what
`mx.quantize` returns and `mx.dequantize`, `mx.quantized_matmul` read, for 2, 3, 4, 5, 6 and 8 bits alike. Scales and
biases (this project's mins) [out, in / group] have the dtype that the model computes in, and MLX decodes in that dtype:
`bias + scale · code`, the product rounded to it and then the sum. In float32 that is `QuantizedTensor.decode` exactly.
Checked against mlx 0.32.4.
"""

from __future__ import annotations

import numpy as np

from optrot_edge.checkpoint import QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.gridspec import MLX_BITS, MLX_DTYPES, MLX_GROUPS, STORED_DTYPES, GridSpec

CHUNK = 2**24  # bits held as bytes at once


def check_grid(spec: GridSpec, name: str = "tensor") -> None:
    """InputError unless MLX's affine mode stores `spec`."""
    if (spec.kind != "min" or spec.subscales or spec.bits not in MLX_BITS or spec.group_size not in MLX_GROUPS
            or spec.scale_dtype not in MLX_DTYPES.values()):
        raise InputError(f"{name} is on grid {spec.name}, which MLX cannot store; quantise to "
                         "mlx-{2,3,4,5,6,8}bit-g{32|64|128}, with -bf16 or -f32 for a model of that dtype")


def pack(tensor: QuantizedTensor) -> dict[str, np.ndarray]:
    """MLX's arrays by the suffix of their name: "weight" uint32 [out, in · bits / 32], "scales" and "biases"
    [out, in / group], bfloat16 as its bits (uint16).

    Raises InputError for a grid that MLX lacks, codes out of range and parameters of another dtype or shape.
    """
    spec, (rows, columns) = tensor.spec, tensor.codes.shape
    check_grid(spec)
    if tensor.codes.dtype != np.uint8 or tensor.codes.max(initial=0) >= spec.levels:
        raise InputError(f"{spec.name} codes must be uint8 below {spec.levels}")
    wanted = (rows, columns // spec.group_size)
    for part in (tensor.scales, tensor.offsets):
        if part is None or part.dtype != np.dtype(STORED_DTYPES[spec.scale_dtype]) or part.shape != wanted:
            raise InputError(f"{spec.name} needs {spec.scale_dtype} scales and mins {list(wanted)}; "
                             "the checkpoint is damaged")
    words = np.empty((rows, columns * spec.bits // 32), "<u4")
    step = max(1, CHUNK // (columns * spec.bits))
    for first in range(0, rows, step):
        part = tensor.codes[first:first + step]
        stream = np.unpackbits(part[..., None], axis=-1, count=spec.bits, bitorder="little")
        words[first:first + step] = np.packbits(stream.reshape(len(part), -1), axis=-1, bitorder="little").view("<u4")
    return {"weight": words, "scales": tensor.scales, "biases": tensor.offsets}


def unpack(parts: dict[str, np.ndarray], spec: GridSpec) -> QuantizedTensor:
    """Inverse of `pack`; ValueError when the arrays do not belong together."""
    words = np.ascontiguousarray(parts["weight"], "<u4")
    rows, columns = words.shape[0], words.shape[1] * 32 // spec.bits
    if parts["scales"].shape != (rows, columns // spec.group_size) or parts["biases"].shape != parts["scales"].shape:
        raise ValueError(f"weight {list(words.shape)}, scales {list(parts['scales'].shape)} and biases "
                         f"{list(parts['biases'].shape)} do not fit {spec.name}")
    codes = np.empty((rows, columns), np.uint8)
    step = max(1, CHUNK // (columns * spec.bits))
    for first in range(0, rows, step):
        stream = np.unpackbits(words[first:first + step].view(np.uint8), axis=-1, bitorder="little")
        bits = stream.reshape(len(stream), columns, spec.bits)
        codes[first:first + step] = np.packbits(bits, axis=-1, bitorder="little")[..., 0]
    return QuantizedTensor(spec, codes, parts["scales"], parts["biases"])
