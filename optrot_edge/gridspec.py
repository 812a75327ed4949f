"""Grids that formats can store: levels, block sizes and the precision of scales, by name. Needs numpy only.

Sources: ggml's block layouts (`ggml-common.h`) and dequantisers, the OCP Microscaling specification 1.0 (MXFP4),
MLX's affine mode, ONNX's MatMulNBits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from optrot_edge.errors import InputError

SUPER_BLOCK = 256  # weights that share the float16 scales of a two-level grid
STORED_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "uint16", "e8m0": "uint8"}
"""numpy dtype that holds each scale dtype: numpy has no bfloat16 and no E8M0, so their bits are kept."""


@dataclass(frozen=True)
class GridSpec:
    """The levels a format can store.

    `kind`: "symmetric" `s·(q − 2^(bits−1))`, "min" `s·q + m` (float min), "zero" `s·(q − z)` (integer
    zero-point), or "codebook" `s·codebook[q]`, the levels ascending. `scale_dtype` is the stored precision of
    scales and mins. With `subscales`, the range of an integer per group, the grid has two levels: 256 weights share
    d (and dmin) in `scale_dtype`, and a group has `s = d·subscale` (and `m = −dmin·submin`, submin ≥ 0).
    """

    name: str
    bits: int
    group_size: int
    kind: str
    scale_dtype: str = "float16"
    codebook: tuple[float, ...] | None = None
    subscales: tuple[int, int] | None = None

    @property
    def levels(self) -> int:
        """Number of codes."""
        return len(self.codebook) if self.codebook else 2**self.bits

    @property
    def block_size(self) -> int:
        """Weights that share stored scales; rows are made of whole blocks."""
        return SUPER_BLOCK if self.subscales else self.group_size

    @property
    def subscale_dtype(self) -> str:
        """numpy dtype that holds the integer scales of a two-level grid."""
        return "int8" if self.subscales[0] < 0 else "uint8"

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and offsets included."""
        scale = np.dtype(STORED_DTYPES[self.scale_dtype]).itemsize * 8
        offset = self.bits if self.kind == "zero" else scale if self.kind == "min" else 0
        if not self.subscales:
            return self.bits + (scale + offset) / self.group_size
        integers = (self.subscales[1] - self.subscales[0]).bit_length() * (2 if self.kind == "min" else 1)
        return self.bits + integers / self.group_size + (scale + offset) / self.block_size

    @property
    def offset_name(self) -> str | None:
        """Suffix of the stored offset tensor: "mins", "zeros" or None."""
        return {"min": "mins", "zero": "zeros"}.get(self.kind)

    @property
    def lowest_zero(self) -> int:
        """The lowest zero-point: GPTQ's format stores 1 less, and its readers disagree about −1."""
        return 1 if self.kind == "zero" and self.scale_dtype == "float16" else 0

    @property
    def is_affine(self) -> bool:
        """Whether the levels need not lie around zero."""
        return self.kind in ("min", "zero")


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GGUF_GRIDS = {spec.name: spec for spec in (
    GridSpec("q4_0", 4, 32, "symmetric"),
    GridSpec("q4_1", 4, 32, "min"),
    GridSpec("q5_0", 5, 32, "symmetric"),
    GridSpec("q5_1", 5, 32, "min"),
    GridSpec("q8_0", 8, 32, "symmetric"),
    GridSpec("q2_k", 2, 16, "min", subscales=(0, 15)),
    GridSpec("q3_k", 3, 16, "symmetric", subscales=(-32, 31)),
    GridSpec("q4_k", 4, 32, "min", subscales=(0, 63)),
    GridSpec("q5_k", 5, 32, "min", subscales=(0, 63)),
    GridSpec("q6_k", 6, 16, "symmetric", subscales=(-128, 127)),
    GridSpec("iq4_nl", 4, 32, "codebook", codebook=IQ4),
    GridSpec("iq4_xs", 4, 32, "codebook", codebook=IQ4, subscales=(-32, 31)),
    GridSpec("mxfp4", 4, 32, "codebook", "e8m0", codebook=E2M1),
)}
FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
FLOAT_TYPES = ("f32", "f16", "bf16")
MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUPS = (32, 64, 128)
ONNX_BITS = (2, 4, 8)
ONNX_GROUPS = (16, 32, 64, 128, 256)
GPTQ_BITS, GPTQ_GROUPS = ONNX_BITS, ONNX_GROUPS
MLX_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}


def grid_spec(name: str) -> GridSpec:
    """The grid of that name: a GGUF type; `int{2..8}-g{group}-{sym|zero|min}` with float32 scales, or float16 ones
    with `-f16` (GPTQ's format has those); or `mlx-{bits}bit-g{32|64|128}[-f16|-bf16|-f32]`, whose scales and biases
    have the model's dtype (float16).

    Raises InputError for an unknown name.
    """
    name = name.lower()
    if name in GGUF_GRIDS:
        return GGUF_GRIDS[name]
    match = re.fullmatch(r"int([2-8])-g([1-9]\d*)-(sym|zero|min)(-f16)?", name)
    if match:
        kind = {"sym": "symmetric", "zero": "zero", "min": "min"}[match[3]]
        return GridSpec(name, int(match[1]), int(match[2]), kind, "float16" if match[4] else "float32")
    match = re.fullmatch(r"mlx-([234568])bit-g(32|64|128)(?:-(f16|bf16|f32))?", name)
    if match:
        return GridSpec(name, int(match[1]), int(match[2]), "min", MLX_DTYPES[match[3] or "f16"])
    raise InputError(f"unknown grid {name!r}; use one of {', '.join(GGUF_GRIDS)}, "
                     "or int{2..8}-g{group}-{sym|zero|min}[-f16] such as int4-g128-sym, "
                     "or mlx-{2,3,4,5,6,8}bit-g{32|64|128}[-bf16|-f32] such as mlx-4bit-g64-bf16")


def fitting_type(kind: str, width: int) -> str:
    """The type for rows of `width` weights where `kind` is asked for: super-blocks of 256 have a block of 32 to fall
    back to when they do not fill the rows. The same as llama-quantize's; whoever falls back says so."""
    return FALLBACKS[kind] if kind in FALLBACKS and width % SUPER_BLOCK else kind


def decode_scales(stored: np.ndarray, scale_dtype: str) -> np.ndarray:
    """float32 values of scales kept as STORED_DTYPES[scale_dtype]. E8M0 byte e means 2^(e − 127)."""
    if scale_dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if scale_dtype == "e8m0":
        return np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    return stored.astype(np.float32)


def encode_scales(values: np.ndarray, scale_dtype: str) -> np.ndarray:
    """Inverse of `decode_scales` for float32 values that `scale_dtype` holds exactly."""
    if scale_dtype == "bfloat16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if scale_dtype == "e8m0":
        return (np.frexp(values)[1] + 126).astype(np.uint8)
    return values.astype(scale_dtype)
