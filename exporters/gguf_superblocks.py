"""Frozen codes ↔ GGUF super-blocks of 256 weights (Q2_K … Q6_K, IQ4_XS), bit for bit.

Everything in a super-block is some field of few bits laid into bytes the same way: a run of bytes holds the first
values in their lowest bits, the next run of values above them, and so on. What differs are the widths, the runs and
the order of the fields. Only Q4_K and Q5_K put their 6-bit scales and mins otherwise. Layouts: ggml's `block_q2_K` …
`block_q6_K` and `block_iq4_xs`.
"""

from __future__ import annotations

import numpy as np

from optrot_edge.checkpoint import GridSpec, QuantizedTensor

SIZES = {"q2_k": 84, "q3_k": 110, "q4_k": 144, "q5_k": 176, "q6_k": 210, "iq4_xs": 136}  # bytes of a super-block


def lay(values: np.ndarray, bits: int, run: int) -> np.ndarray:
    """`values` [..., n] below 2^bits as uint8 [..., n · bits / 8]: byte i of each `run` bytes holds the values
    i, i + run, i + 2 run … from its lowest bits up."""
    fields = 8 // bits
    values = values.reshape(*values.shape[:-1], -1, fields, run)
    out = np.zeros((*values.shape[:-2], run), np.uint8)
    for field in range(fields):
        out |= values[..., field, :] << np.uint8(bits * field)
    return out.reshape(*out.shape[:-2], -1)


def lift(packed: np.ndarray, bits: int, run: int) -> np.ndarray:
    """Inverse of `lay`."""
    fields = 8 // bits
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    values = packed.reshape(*packed.shape[:-1], -1, 1, run) >> shifts & np.uint8(2**bits - 1)
    return values.reshape(*packed.shape[:-1], packed.shape[-1] * fields)


def pack_codes(spec: GridSpec, codes: np.ndarray) -> list[np.ndarray]:
    """The fields of uint8 `codes` [..., 256], in file order."""
    if spec.name == "q2_k":
        return [lay(codes, 2, 32)]
    if spec.name == "q3_k":
        return [lay(codes >> 2, 1, 32), lay(codes & 3, 2, 32)]
    if spec.name == "q5_k":
        return [lay(codes >> 4, 1, 32), lay(codes & 15, 4, 32)]
    if spec.name == "q6_k":
        return [lay(codes & 15, 4, 64), lay(codes >> 4, 2, 32)]
    return [lay(codes, 4, 16 if spec.codebook else 32)]


def unpack_codes(spec: GridSpec, fields: list[np.ndarray]) -> np.ndarray:
    """Inverse of `pack_codes`."""
    if spec.name == "q2_k":
        return lift(fields[0], 2, 32)
    if spec.name == "q3_k":
        return lift(fields[0], 1, 32) << 2 | lift(fields[1], 2, 32)
    if spec.name == "q5_k":
        return lift(fields[0], 1, 32) << 4 | lift(fields[1], 4, 32)
    if spec.name == "q6_k":
        return lift(fields[0], 4, 64) | lift(fields[1], 2, 32) << 4
    return lift(fields[0], 4, 16 if spec.codebook else 32)


def pack_subscales(spec: GridSpec, scales: np.ndarray, mins: np.ndarray | None) -> list[np.ndarray]:
    """The fields of integer scales (and mins) [..., groups], in file order."""
    if spec.name == "q2_k":
        return [lay(np.concatenate([scales, mins], -1), 4, 16)]
    if spec.name == "q6_k":
        return [scales.view(np.uint8)]
    if spec.subscales[0] < 0:
        raised = (scales.astype(np.int16) - spec.subscales[0]).astype(np.uint8)
        low, high = raised & 15, raised >> 4
        return [lay(low, 4, 8), lay(high, 2, 4)] if spec.name == "q3_k" else [lay(high, 2, 1), lay(low, 4, 1)]
    above = [values[..., :4] | (values[..., 4:] >> 4) << 6 for values in (scales, mins)]
    return [np.concatenate([*above, scales[..., 4:] & 15 | (mins[..., 4:] & 15) << 4], -1)]


def unpack_subscales(spec: GridSpec, fields: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Inverse of `pack_subscales`."""
    if spec.name == "q2_k":
        both = lift(fields[0], 4, 16)
        return both[..., :16], both[..., 16:]
    if spec.name == "q6_k":
        return fields[0].view(np.int8), None
    if spec.subscales[0] < 0:
        raised = (lift(fields[0], 4, 8) | lift(fields[1], 2, 4) << 4 if spec.name == "q3_k"
                  else lift(fields[1], 4, 1) | lift(fields[0], 2, 1) << 4)
        return (raised.astype(np.int16) + spec.subscales[0]).astype(np.int8), None
    first, second, rest = np.split(fields[0], 3, -1)
    return (np.concatenate([first & 63, rest & 15 | first >> 6 << 4], -1),
            np.concatenate([second & 63, rest >> 4 | second >> 6 << 4], -1))


ORDER = {  # of the fields in a super-block: d and dmin ("d"), integer scales (0, 1), codes ("a", "b")
    "q2_k": "0ad", "q3_k": "ab01d", "q4_k": "d0a", "q5_k": "d0ab", "q6_k": "ab0d", "iq4_xs": "d01a"}
WIDTHS = {  # bytes of those fields, in that order
    "q2_k": (16, 64, 4), "q3_k": (32, 64, 8, 4, 2), "q4_k": (4, 12, 128), "q5_k": (4, 12, 32, 128),
    "q6_k": (128, 64, 16, 2), "iq4_xs": (2, 2, 4, 128)}


def pack_super(tensor: QuantizedTensor, scales: np.ndarray) -> np.ndarray:
    """Super-blocks uint8 [out, in / 256, bytes]; `scales` are the bytes of d (and dmin) [out, in / 256, 2 or 4].
    Shapes, types and ranges are the caller's to check."""
    spec, (rows, blocks) = tensor.spec, scales.shape[:2]
    per_block = lambda array: None if array is None else array.reshape(rows, blocks, -1)  # noqa: E731
    fields = {"d": scales}
    fields |= dict(zip("01", pack_subscales(spec, per_block(tensor.subscales), per_block(tensor.suboffsets)),
                       strict=False))
    fields |= dict(zip("ab", pack_codes(spec, per_block(tensor.codes)), strict=False))
    return np.concatenate([fields[key] for key in ORDER[spec.name]], -1)


def unpack_super(blocks: np.ndarray, spec: GridSpec) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes [..., 256], bytes of d (and dmin), integer scales and mins (or None) [..., groups] of super-blocks
    uint8 [..., bytes]."""
    parts = np.split(blocks, np.cumsum(WIDTHS[spec.name])[:-1], -1)
    fields = {key: np.ascontiguousarray(part) for key, part in zip(ORDER[spec.name], parts, strict=True)}
    codes = unpack_codes(spec, [fields[key] for key in "ab" if key in fields])
    return codes, fields["d"], *unpack_subscales(spec, [fields[key] for key in "01" if key in fields])
