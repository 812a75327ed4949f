"""What each package format stores: its types, its defaults, and short names for them. Needs no torch."""

from __future__ import annotations

import re

from optrot_edge.errors import InputError
from optrot_edge.gridspec import (
    FLOAT_TYPES,
    GGUF_GRIDS,
    GPTQ_BITS,
    GPTQ_GROUPS,
    MLX_BITS,
    MLX_DTYPES,
    MLX_GROUPS,
    ONNX_BITS,
    ONNX_GROUPS,
    grid_spec,
)

FORMATS = ("gguf", "mlx", "onnx", "gptq")
DTYPES = {"mlx": tuple(MLX_DTYPES.values()), "onnx": ("float32", "float16"), "gptq": ("float16",)}
BITS = {"mlx": MLX_BITS, "onnx": ONNX_BITS, "gptq": GPTQ_BITS}
GROUPS = {"mlx": MLX_GROUPS, "onnx": ONNX_GROUPS, "gptq": GPTQ_GROUPS}
DEFAULT_BITS = 4
DEFAULT_GROUP = {"mlx": 64, "onnx": 32, "gptq": 128}  # of mlx-lm, onnxruntime-genai, GPTQModel
FLOAT_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0}
GGUF_TYPES = (*GGUF_GRIDS, "f32", "f16", "bf16")
_NAMES = {"mlx": "MLX", "onnx": "ONNX", "gptq": "GPTQ"}
_DTYPE_NAMES = {dtype: short for short, dtype in MLX_DTYPES.items()}
_PATTERNS = {
    "mlx": r"(?:mlx-)?(?P<bits>\d+)bit(?:-g(?P<group>\d+))?(?:-(?P<dtype>f16|bf16|f32))?",
    "onnx": r"(?:int(?P<int>\d)|(?P<bits>\d+)bit)(?:-g(?P<group>\d+))?(?:-(?P<zero>sym|zero))?(?:-(?P<dtype>f16))?",
}
_PATTERNS["gptq"] = _PATTERNS["onnx"]
_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16"}


def check_format(name: str) -> None:
    """InputError unless `name` is a package format."""
    if name not in FORMATS:
        raise InputError(f"--format {name}: use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def grid_type(format: str, bits: int | None = None, group_size: int | None = None, dtype: str = "float16",
              symmetric: bool | None = None) -> str:
    """Name of the affine grid of an MLX, ONNX or GPTQ package of `dtype`; InputError for what it cannot store.

    `symmetric` has ONNX's and GPTQ's zero-points in the middle; None: ONNX's are not, GPTQ's are.
    """
    bits, group_size = DEFAULT_BITS if bits is None else bits, group_size or DEFAULT_GROUP[format]
    if bits not in BITS[format]:
        raise InputError(f"--bits {bits}: {_NAMES[format]} stores {', '.join(map(str, BITS[format]))}")
    if group_size not in GROUPS[format]:
        raise InputError(f"--group-size {group_size}: {_NAMES[format]} stores groups of "
                         f"{', '.join(map(str, GROUPS[format]))}")
    symmetric = format == "gptq" if symmetric is None else symmetric
    if format == "mlx":
        return f"mlx-{bits}bit-g{group_size}-{_DTYPE_NAMES[dtype]}"
    return f"int{bits}-g{group_size}-{'sym' if symmetric else 'zero'}{'-f16' if dtype == 'float16' else ''}"


def source_dtype(stored: str) -> str:
    """The dtype of a package made from a model whose weights are `stored` so (the reader's name of it): the model's
    own, float16 for one that is quantised."""
    return _STORED.get(stored, "float16")


def full_type(format: str, kind: str, dtype: str, group_size: int | None = None, symmetric: bool | None = None) -> str:
    """The grid or float type that an MLX, ONNX or GPTQ package of `dtype` has for `kind`.

    `6bit` and `6bit-g32` are short for `mlx-6bit-g32-f16`; for the others `8bit`, `8bit-g32`, `8bit-g32-sym` will do.
    Raises InputError for what the format cannot store, and for a dtype that is not the package's.
    """
    short, name = _DTYPE_NAMES[dtype], _NAMES[format]
    if kind in MLX_DTYPES:
        if kind != short:
            raise InputError(f"{kind}: {name} packages have one dtype, here {dtype}; choose it with --dtype")
        return kind
    match = re.fullmatch(_PATTERNS[format], kind)
    if not match:
        raise InputError(f"{kind}: {name} stores {', '.join(f'{bits}bit' for bits in BITS[format])} "
                         f"(such as {BITS[format][-1]}bit-g32 with groups of 32) and {short}")
    found = match.groupdict()
    if found["dtype"] not in (None, short):
        raise InputError(f"{kind}: {name} packages have one dtype, here {dtype}; choose it with --dtype")
    group_size = int(found["group"]) if found["group"] else group_size
    symmetric = found["zero"] == "sym" if found.get("zero") else symmetric
    return grid_type(format, int(found.get("int") or found["bits"]), group_size, dtype, symmetric)


def candidates(width: int, format: str = "gguf", dtype: str | None = None, group_size: int | None = None,
               symmetric: bool | None = None) -> list[str]:
    """Types of `format` for rows of `width` weights."""
    if format == "gguf":
        return [name for name, spec in GGUF_GRIDS.items() if width % spec.block_size == 0]
    groups = GROUPS[format] if group_size is None else (group_size,)
    return [grid_type(format, bits, group, dtype, symmetric)
            for bits in BITS[format] for group in groups if width % group == 0]


def bits_of(kind: str, dtype: str | None = None) -> float:
    """Stored bits per weight of a grid or float type; all floats of packages but GGUF have its `dtype`."""
    if kind in FLOAT_TYPES:
        return FLOAT_BITS[kind] if dtype is None else 32.0 if dtype == "float32" else 16.0
    return grid_spec(kind).bits_per_weight
