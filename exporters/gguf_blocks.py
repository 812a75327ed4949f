"""Frozen codes ↔ GGUF blocks, bit for bit: those of 32 weights here, super-blocks of 256 in `gguf_superblocks`.

A block of 32 holds, in this order: float16 scale `d`; float16 minimum `m` (the `_1` types); for 5 bits,
four bytes with the fifth bit of weight j at bit j, little-endian; then for 4 and 5 bits, sixteen
bytes whose byte j has the low four bits of weight j below those of weight j + 16; for 8 bits,
thirty-two int8 equal to code − 128. IQ4_NL is laid out as Q4_0; MXFP4 has an E8M0 byte for the scale and the E2M1
number (sign, two exponent bits, one mantissa bit) as the four bits. Layouts: ggml's `block_q4_0` … `block_mxfp4`.
"""

from __future__ import annotations

import numpy as np

from optrot_edge.checkpoint import GGUF_GRIDS, GridSpec, QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_superblocks import SIZES, pack_super, unpack_super

BLOCK = 32
E2M1_ZERO = 7  # code of 0.0: those below it are negative, in falling magnitude


def block_bytes(spec: GridSpec) -> int:
    """Bytes of one block of `spec.block_size` weights."""
    if spec.subscales:
        return SIZES[spec.name]
    scale = 1 if spec.scale_dtype == "e8m0" else 4 if spec.kind == "min" else 2
    return BLOCK * spec.bits // 8 + scale


def check_grid(spec: GridSpec, name: str = "tensor") -> None:
    """InputError unless GGUF has a block type for `spec`."""
    if GGUF_GRIDS.get(spec.name) != spec:
        raise InputError(f"{name} is on grid {spec.name}, which GGUF cannot store; "
                         f"quantise to one of {', '.join(GGUF_GRIDS)}")


def pack(tensor: QuantizedTensor) -> np.ndarray:
    """Blocks of `tensor` as uint8 [out, in / block size · block bytes].

    Raises InputError for a grid that GGUF lacks, rows that do not fill blocks, codes or integer scales out of range,
    and scales or mins that are not finite float16 [out, blocks] (E8M0: a byte below 255).
    """
    spec = tensor.spec
    check_grid(spec)
    rows, columns = tensor.codes.shape
    if columns % spec.block_size:
        raise InputError(f"rows of {columns} weights do not fill {spec.name} blocks of {spec.block_size}")
    shape = (rows, columns // spec.block_size)
    if tensor.codes.dtype != np.uint8 or tensor.codes.max(initial=0) >= spec.levels:
        raise InputError(f"{spec.name} codes must be uint8 below {spec.levels}")
    scales = _scale_bytes(tensor, shape)
    if spec.subscales:
        _check_integers(tensor)
        return pack_super(tensor, scales).reshape(rows, -1)
    parts, codes = [scales], tensor.codes.reshape(*shape, BLOCK)
    if spec.name == "mxfp4":
        codes = _as_e2m1(codes)
    if spec.bits == 8:
        parts.append(codes ^ np.uint8(0x80))  # two's complement of code - 128
    else:
        if spec.bits == 5:
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & 0x0F
        parts.append(low[..., :16] | low[..., 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def unpack(raw: np.ndarray, grid: str | GridSpec, shape: tuple[int, int]) -> QuantizedTensor:
    """Inverse of `pack`: the codes and parameters of blocks `raw` for a [out, in] tensor.

    Raises ValueError if `raw` does not hold exactly that many blocks.
    """
    spec = GGUF_GRIDS[grid] if isinstance(grid, str) else grid
    rows, columns = shape
    blocks = np.ascontiguousarray(raw, np.uint8).reshape(rows, columns // spec.block_size, block_bytes(spec))
    if spec.subscales:
        codes, scale_bytes, *integers = unpack_super(blocks, spec)
        integers = [None if part is None else part.reshape(rows, -1) for part in integers]
        return QuantizedTensor(spec, codes.reshape(rows, columns), *_halves(scale_bytes, spec), *integers)
    if spec.scale_dtype == "e8m0":
        scales, offsets, start = blocks[..., 0].copy(), None, 1
    else:
        start = 4 if spec.kind == "min" else 2
        scales, offsets = _halves(blocks[..., :start], spec)
    if spec.bits == 8:
        codes = blocks[..., start:] ^ np.uint8(0x80)
    else:
        nibbles = blocks[..., -16:]
        codes = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=-1)
        if spec.bits == 5:
            high = np.unpackbits(blocks[..., start:start + 4], axis=-1, bitorder="little")
            codes = codes | high << 4
    if spec.name == "mxfp4":
        codes = _from_e2m1(codes)
    return QuantizedTensor(spec, codes.reshape(rows, columns), scales, offsets)


def _as_e2m1(codes: np.ndarray) -> np.ndarray:
    """Places among the ascending levels as sign (bit 3) and magnitude (bits 0 to 2)."""
    magnitude = np.abs(codes.astype(np.int8) - E2M1_ZERO).astype(np.uint8)
    return magnitude | np.where(codes < E2M1_ZERO, np.uint8(8), np.uint8(0))


def _from_e2m1(bits: np.ndarray) -> np.ndarray:
    """Inverse of `_as_e2m1`; both zeros are the same level."""
    magnitude = (bits & 7).astype(np.int8)
    return np.where(bits & 8, E2M1_ZERO - magnitude, E2M1_ZERO + magnitude).astype(np.uint8)


def _scale_bytes(tensor: QuantizedTensor, shape: tuple[int, int]) -> np.ndarray:
    """d, and dmin or m behind it, as bytes [out, blocks, 1, 2 or 4 of them]."""
    if tensor.spec.scale_dtype == "e8m0":
        scales = tensor.scales
        if scales.dtype != np.uint8 or scales.shape != shape or scales.max(initial=0) == 255:
            raise InputError(f"scales must be E8M0 bytes below 255 {list(shape)}; the checkpoint is damaged")
        return scales[..., None]
    parts = [_half_bytes(tensor.scales, shape, "scales")]
    if tensor.spec.kind == "min":
        parts.append(_half_bytes(tensor.offsets, shape, "mins"))
    return np.concatenate(parts, -1)


def _half_bytes(values: np.ndarray | None, shape: tuple[int, int], what: str) -> np.ndarray:
    """float16 [out, blocks] as little-endian bytes [out, blocks, 2]."""
    if values is None or values.dtype != np.float16 or values.shape != shape:
        raise InputError(f"{what} must be float16 {list(shape)}; the checkpoint is damaged")
    if not np.isfinite(values).all():
        raise InputError(f"{what} hold NaN or infinity; quantise again")
    return np.ascontiguousarray(values, "<f2")[..., None].view(np.uint8)


def _halves(raw: np.ndarray, spec: GridSpec) -> tuple[np.ndarray, np.ndarray | None]:
    """float16 scales and mins (or None) [out, blocks] of bytes [out, blocks, 2 or 4]."""
    values = np.ascontiguousarray(raw).view("<f2").astype(np.float16)
    return values[..., 0], values[..., 1] if spec.kind == "min" else None


def _check_integers(tensor: QuantizedTensor) -> None:
    """InputError unless the integer scales (and mins) are what the format can hold."""
    spec, (rows, columns) = tensor.spec, tensor.codes.shape
    shape, (low, high) = (rows, columns // spec.group_size), spec.subscales
    for values in (tensor.subscales, *((tensor.suboffsets,) if spec.kind == "min" else ())):
        if (values is None or values.dtype != np.dtype(spec.subscale_dtype) or values.shape != shape
                or not low <= values.min(initial=0) <= values.max(initial=0) <= high):
            raise InputError(f"{spec.name} needs {spec.subscale_dtype} {list(shape)} from {low} to {high} as integer "
                             "scales; the checkpoint is damaged")
