"""What each package format stores: its types, its defaults, and short names for them. Needs no torch."""

from __future__ import annotations

import re

from optrot_edge.errors import InputError
from optrot_edge.gridspec import FLOAT_TYPES, GGUF_GRIDS, MLX_BITS, MLX_DTYPES, MLX_GROUPS, grid_spec

FORMATS = ("gguf", "mlx")
DTYPES = tuple(MLX_DTYPES.values())  # of an MLX package
DEFAULT_BITS, DEFAULT_GROUP = 4, 64  # mlx-lm's own
FLOAT_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0}
GGUF_TYPES = (*GGUF_GRIDS, "f32", "f16")
_DTYPE_NAMES = {dtype: short for short, dtype in MLX_DTYPES.items()}
_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16"}


def check_format(name: str) -> None:
    """InputError unless `name` is a package format."""
    if name not in FORMATS:
        raise InputError(f"--format {name}: use {' or '.join(FORMATS)}")


def mlx_type(bits: int | None = None, group_size: int | None = None, dtype: str = "float16") -> str:
    """Name of MLX's affine grid; InputError for what MLX cannot store."""
    bits, group_size = DEFAULT_BITS if bits is None else bits, DEFAULT_GROUP if group_size is None else group_size
    if bits not in MLX_BITS:
        raise InputError(f"--bits {bits}: MLX stores {', '.join(map(str, MLX_BITS))}")
    if group_size not in MLX_GROUPS:
        raise InputError(f"--group-size {group_size}: MLX stores groups of {', '.join(map(str, MLX_GROUPS))}")
    return f"mlx-{bits}bit-g{group_size}-{_DTYPE_NAMES[dtype]}"


def source_dtype(stored: str) -> str:
    """The dtype of a package made from a model whose weights are `stored` so (the reader's name of it): the model's
    own, float16 for one that is quantised."""
    return _STORED.get(stored, "float16")


def full_type(kind: str, dtype: str, group_size: int | None = None) -> str:
    """The grid or float type that an MLX package of `dtype` has for `kind`: `6bit`, `6bit-g32` and `mlx-6bit-g32` are
    short for `mlx-6bit-g32-f16`.

    Raises InputError for what MLX cannot store, and for a dtype that is not the package's.
    """
    short = _DTYPE_NAMES[dtype]
    if kind in MLX_DTYPES:
        if kind != short:
            raise InputError(f"{kind}: an MLX package has one dtype, here {dtype}; choose it with --dtype")
        return kind
    match = re.fullmatch(r"(?:mlx-)?(\d+)bit(?:-g(\d+))?(?:-(f16|bf16|f32))?", kind)
    if not match:
        raise InputError(f"{kind}: MLX stores {', '.join(f'{bits}bit' for bits in MLX_BITS)} "
                         f"(6bit-g32 with groups of 32) and {short}")
    if match[3] not in (None, short):
        raise InputError(f"{kind}: an MLX package has one dtype, here {dtype}; choose it with --dtype")
    return mlx_type(int(match[1]), int(match[2]) if match[2] else group_size, dtype)


def candidates(width: int, format: str = "gguf", dtype: str | None = None, group_size: int | None = None) -> list[str]:
    """Types of `format` for rows of `width` weights."""
    if format == "gguf":
        return [name for name, spec in GGUF_GRIDS.items() if width % spec.block_size == 0]
    groups = MLX_GROUPS if group_size is None else (group_size,)
    return [mlx_type(bits, group, dtype) for bits in MLX_BITS for group in groups if width % group == 0]


def bits_of(kind: str, dtype: str | None = None) -> float:
    """Stored bits per weight of a grid or float type; all floats of an MLX package have its `dtype`."""
    if kind in FLOAT_TYPES:
        return FLOAT_BITS[kind] if dtype is None else 32.0 if dtype == "float32" else 16.0
    return grid_spec(kind).bits_per_weight
