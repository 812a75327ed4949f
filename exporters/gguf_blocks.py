"""Frozen codes ↔ GGUF blocks of 32 weights (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0), bit for bit.

A block holds, in this order: float16 scale `d`; float16 minimum `m` (the `_1` types); for 5 bits,
four bytes with the fifth bit of weight j at bit j, little-endian; then for 4 and 5 bits, sixteen
bytes whose byte j has the low four bits of weight j below those of weight j + 16; for 8 bits,
thirty-two int8 equal to code − 128. Layouts: ggml's `block_q4_0` … `block_q8_0`.
"""

from __future__ import annotations

import numpy as np

from optrot_edge.checkpoint import GGUF_GRIDS, GridSpec, QuantizedTensor
from optrot_edge.errors import InputError

BLOCK = 32


def block_bytes(spec: GridSpec) -> int:
    """Bytes of one block of 32 weights."""
    return BLOCK * spec.bits // 8 + (4 if spec.kind == "min" else 2)


def check_grid(spec: GridSpec, name: str = "tensor") -> None:
    """InputError unless GGUF has a block type for `spec`."""
    if GGUF_GRIDS.get(spec.name) != spec:
        raise InputError(f"{name} is on grid {spec.name}, which GGUF cannot store; "
                         f"quantise to one of {', '.join(GGUF_GRIDS)}")


def pack(tensor: QuantizedTensor) -> np.ndarray:
    """Blocks of `tensor` as uint8 [out, in / 32 · block bytes].

    Raises InputError for a grid that GGUF lacks, rows that are no multiple of 32, and scales or
    mins that are not finite float16 [out, in / 32].
    """
    spec = tensor.spec
    check_grid(spec)
    rows, columns = tensor.codes.shape
    if columns % BLOCK:
        raise InputError(f"rows of {columns} weights do not fill {spec.name} blocks of {BLOCK}")
    shape = (rows, columns // BLOCK)
    if tensor.codes.dtype != np.uint8 or (spec.bits < 8 and tensor.codes.max(initial=0) >= spec.levels):
        raise InputError(f"{spec.name} codes must be uint8 below {spec.levels}")
    parts = [_half_bytes(tensor.scales, shape, "scales")]
    if spec.kind == "min":
        parts.append(_half_bytes(tensor.offsets, shape, "mins"))
    codes = tensor.codes.reshape(*shape, BLOCK)
    if spec.bits == 8:
        parts.append(codes ^ np.uint8(0x80))  # two's complement of code - 128
    else:
        if spec.bits == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & 0x0F
        parts.append(low[..., :16] | low[..., 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def unpack(raw: np.ndarray, grid: str | GridSpec, shape: tuple[int, int]) -> QuantizedTensor:
    """Inverse of `pack`: the codes, scales and mins of blocks `raw` for a [out, in] tensor.

    Raises ValueError if `raw` does not hold exactly that many blocks.
    """
    spec = GGUF_GRIDS[grid] if isinstance(grid, str) else grid
    rows, columns = shape
    blocks = np.ascontiguousarray(raw, np.uint8).reshape(rows, columns // BLOCK, block_bytes(spec))
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float16)
    offsets, start = None, 2
    if spec.kind == "min":
        offsets = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0].astype(np.float16)
        start = 4
    if spec.bits == 8:
        codes = blocks[..., start:] ^ np.uint8(0x80)
    else:
        nibbles = blocks[..., -16:]
        codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
        if spec.bits == 5:
            high = np.unpackbits(blocks[..., start:start + 4], axis=-1, bitorder="little")
            codes = codes | high << 4
    return QuantizedTensor(spec, codes.reshape(rows, columns), scales, offsets)


def _half_bytes(values: np.ndarray | None, shape: tuple[int, int], what: str) -> np.ndarray:
    """float16 [out, blocks] as little-endian bytes [out, blocks, 2]."""
    if values is None or values.dtype != np.float16 or values.shape != shape:
        raise InputError(f"{what} must be float16 {list(shape)}; the checkpoint is damaged")
    if not np.isfinite(values).all():
        raise InputError(f"{what} hold NaN or infinity; quantise again")
    return np.ascontiguousarray(values, "<f2")[..., None].view(np.uint8)
