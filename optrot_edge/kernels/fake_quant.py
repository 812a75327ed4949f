"""Per-token symmetric fake quantisation of activations (A8, A4)."""

from __future__ import annotations

import math

import torch

from optrot_edge.kernels.launch import HALF_DTYPES, check_out, device_of, require_triton, runs_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # see launch.py
    triton = None

TRITON_DTYPES = (torch.float32, *HALF_DTYPES)
SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number: a token of zeros stays zero
_TILE = 4096  # elements of a token held at once


def fake_quantize(x: torch.Tensor, bits: int = 8, *, clip: float = 1.0, return_scales: bool = False,
                  out: torch.Tensor | None = None):
    """Round every token (last axis) of `x` [..., n] to integers of `bits` bits times its own scale.

    scale = clip · max|x| / q with q = 2^(bits-1) − 1, and y = scale · clamp(round(x / scale), −q, q),
    rounding halves to even, computed in float32 (float64 for float64) and rounded to x's dtype once
    (per-token symmetric as in QuaRot, arXiv 2404.00456, section 4, whose clip is 0.9).
    `clip` in (0, 1] cuts the largest values to make the steps finer. A token that holds NaN or infinity
    comes out as NaN. No gradient is recorded.

    Returns a tensor of x's shape and dtype (`out` if given, which may be x itself), and with
    `return_scales` also the scales [..., 1], float32 (float64). Runs in Triton on CUDA, else in torch.
    Raises ValueError on bits outside 2..8, a clip outside (0, 1], a dtype or an `out` that does not fit.
    """
    function = fake_quantize_triton if runs_triton(x.detach(), TRITON_DTYPES) else fake_quantize_torch
    return function(x, bits, clip=clip, return_scales=return_scales, out=out)


@torch.no_grad()
def fake_quantize_torch(x: torch.Tensor, bits: int = 8, *, clip: float = 1.0, return_scales: bool = False,
                        out: torch.Tensor | None = None):
    """The twin of `fake_quantize_triton`; float64 too. See `fake_quantize`."""
    _check(x, bits, clip, out)
    top = 2 ** (bits - 1) - 1
    wide = x.float() if x.dtype in HALF_DTYPES else x
    largest = wide.abs().amax(-1, keepdim=True) if x.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)
    # A full tensor for the divisor: dividing by a Python number may multiply by its inverse instead.
    scales = (largest * clip / torch.full_like(largest, top)).clamp_min(SMALLEST_SCALE)
    scales = torch.where(largest < math.inf, scales, math.nan)
    y = (wide / scales).clamp(-top, top).round().mul_(scales).to(x.dtype)
    y = y if out is None else out.copy_(y)
    return (y, scales) if return_scales else y


@torch.no_grad()
def fake_quantize_triton(x: torch.Tensor, bits: int = 8, *, clip: float = 1.0, return_scales: bool = False,
                         out: torch.Tensor | None = None):
    """`fake_quantize` of a CUDA tensor (or, under TRITON_INTERPRET=1, a CPU one): float32 or half."""
    _check(x, bits, clip, out)
    require_triton(x)
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(f"the Triton kernel takes float32, float16 or bfloat16, not {x.dtype}; "
                         "use fake_quantize_torch")
    x = x.contiguous()
    y = out if out is not None and out.is_contiguous() else torch.empty_like(x)
    scales = torch.full((*x.shape[:-1], 1), SMALLEST_SCALE, dtype=torch.float32, device=x.device)
    if x.numel():
        width, tokens = x.shape[-1], scales.numel()
        columns, rows, warps = tile_shape(width)
        with device_of(x):
            _fake_quant_kernel[(triton.cdiv(tokens, rows),)](
                x, y, scales, tokens, clip, WIDTH=width, TOP=2 ** (bits - 1) - 1, SMALLEST=SMALLEST_SCALE,
                ROWS=rows, COLUMNS=columns, num_warps=warps)
    y = y if out is None or y is out else out.copy_(y)
    return (y, scales) if return_scales else y


def tile_shape(width: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile for tokens of `width` elements, and its warps."""
    columns = min(_TILE, triton.next_power_of_2(width))
    return columns, max(1, min(16, _TILE // (2 * columns))), 8 if columns == _TILE else 4


def _check(x: torch.Tensor, bits: int, clip: float, out: torch.Tensor | None) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits {bits}: 2 to 8 are needed")
    if not 0 < clip <= 1:
        raise ValueError(f"clip {clip}: a ratio above 0 and up to 1 is needed")
    if x.ndim < 1 or x.dtype not in (*TRITON_DTYPES, torch.float64):
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: tokens along a last axis, in float16, bfloat16, "
                         "float32 or float64, are needed")
    check_out(x, out)


if triton is not None:
    @triton.jit
    def _fake_quant_kernel(x, y, scales, tokens, clip, WIDTH: tl.constexpr, TOP: tl.constexpr,
                           SMALLEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        columns = tl.arange(0, COLUMNS)
        largest = tl.zeros((ROWS,), dtype=tl.int32)
        # WIDTH is a constant: models have few, and Triton 3.6's interpreter cannot loop to a variable.
        for start in range(0, WIDTH, COLUMNS):
            inside = (rows[:, None] < tokens) & (columns[None, :] + start < WIDTH)
            value = tl.load(x + rows[:, None] * WIDTH + columns[None, :] + start, mask=inside, other=0.0)
            # As integers magnitudes have the same order, and NaN comes after infinity instead of vanishing.
            bits = value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            largest = tl.maximum(largest, tl.max(bits, axis=1))
        peak = largest.to(tl.float32, bitcast=True)
        # Correctly rounded quotients: an approximate one would round some halves the other way.
        scale = tl.div_rn(peak * clip, tl.full((ROWS,), TOP, tl.float32))
        scale = tl.where(scale < SMALLEST, SMALLEST, scale)
        scale = tl.where(peak < float("inf"), scale, float("nan"))
        tl.store(scales + rows, scale, mask=rows < tokens)
        for start in range(0, WIDTH, COLUMNS):  # the token's second reading comes from the cache
            inside = (rows[:, None] < tokens) & (columns[None, :] + start < WIDTH)
            index = rows[:, None] * WIDTH + columns[None, :] + start
            value = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
            steps = tl.div_rn(value, tl.broadcast_to(scale[:, None], (ROWS, COLUMNS)))
            steps = tl.minimum(tl.maximum(steps, -TOP), TOP)
            steps = (steps + 12582912.0) - 12582912.0  # 1.5 · 2²³: float32's own rounding, halves to even
            tl.store(y + index, (steps * scale[:, None]).to(y.dtype.element_ty), mask=inside)
