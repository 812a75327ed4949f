"""OptRot's objective and its closed-form gradient: two GEMMs with a cubing between them.

For `Y = X R` and row weights `w`: `f = Σ_i w_i Σ_j Y_ij⁴` and `∇_R f = 4 Xᵀ (w ∘ Y³)`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows, a machine without the extra `learn`: the twin does the work
    triton = None

FUSED_DTYPES = (torch.float32, torch.bfloat16)
_TWIN_ROWS = 2048  # rows per slice of the twin: Y and Y³ of a slice stay in cache on a CPU
_BLOCK = 4096  # elements of Y per program of the unfused kernel


def fourth_power(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None, *,
                 backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """`Σ_i w_i Σ_j (X R)_ij⁴` and its gradient with respect to `R`.

    `x` is [n, d], `r` [d, m], `weights` [n] or None (all ones); `x` and `r` share one dtype, and x
    may be a transposed view. Returns the loss (float64 scalar) and the gradient [d, m], float32
    for bfloat16 inputs and otherwise in the inputs' dtype. `backend` is "auto" (Triton for
    float32 and bfloat16 on CUDA, else torch), "torch" or "triton".
    Raises ValueError on shapes or dtypes that do not fit, or a backend that cannot run here.
    """
    if backend == "auto":
        fused = triton is not None and x.is_cuda and x.dtype in FUSED_DTYPES
        backend = "triton" if fused else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend {backend!r}: use auto, torch or triton")
    return (fourth_power_triton if backend == "triton" else fourth_power_torch)(x, r, weights)


@torch.no_grad()
def fourth_power_torch(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None, *,
                       input_precision: str = "ieee") -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `fourth_power_triton`, and what it means: see `fourth_power`.

    Row sums are taken in the working dtype (float32, or float64 for float64 inputs) and added up in
    float64. `input_precision` is accepted for the signature's sake; torch's own setting rules.
    """
    _check(x, r, weights, input_precision)
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    home = "cpu" if x.device.type == "mps" else x.device  # Apple GPUs have no float64
    step = _TWIN_ROWS if x.device.type == "cpu" else max(len(x), 1)
    loss = torch.zeros((), dtype=torch.float64, device=home)
    grad = torch.zeros(r.shape, dtype=work, device=r.device)
    rotation = r.to(work)
    for start in range(0, len(x), step):
        rows = x[start:start + step].to(work)
        y = rows @ rotation
        squared = y * y
        sums = torch.einsum("ij,ij->i", squared, squared)
        cubed = y.mul_(squared)
        if weights is not None:
            weight = weights[start:start + step].to(work)
            sums = sums * weight
            cubed.mul_(weight[:, None])
        loss += sums.to(home).sum(dtype=torch.float64)
        grad.addmm_(rows.T, cubed.to(x.dtype).to(work))
    return loss, grad.mul_(4)


@torch.no_grad()
def fourth_power_triton(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None, *,
                        input_precision: str = "ieee",
                        fused: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`fourth_power` with its cubing, weighting and loss in a Triton kernel.

    `fused` True does them in the epilogue of a Triton `X R` (precision "ieee", "tf32" or "tf32x3"),
    False in one pass over torch's `X R` (float32 only). None picks False for float32 at "ieee",
    where the product runs on the FMA units and cuBLAS is hard to match, and True otherwise.
    `Xᵀ (w ∘ Y³)` is torch's product and follows torch's own precision setting.
    Takes CUDA tensors; CPU tensors too when triton was imported under TRITON_INTERPRET=1.
    """
    _check(x, r, weights, input_precision)
    require_triton(x)
    if x.dtype not in FUSED_DTYPES:
        raise ValueError(f"the Triton kernel takes float32 or bfloat16, not {x.dtype}; use backend='torch'")
    if fused is None:
        fused = x.dtype != torch.float32 or input_precision != "ieee"
    if not fused and x.dtype != torch.float32:
        raise ValueError("fused=False rounds Y to the inputs' dtype; it takes float32 only")
    (n, d), m = x.shape, r.shape[1]
    if n == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device), torch.zeros_like(r, dtype=torch.float32)
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    with device_of(x):
        launch = _cube_fused if fused else _cube_separate
        cubed, partial = launch(x, r, weights, n, d, m, input_precision)
        if x.dtype == torch.float32:
            grad = x.T @ cubed
        elif x.is_cuda:
            grad = torch.mm(x.T, cubed, out_dtype=torch.float32)
        else:
            grad = x.T.float() @ cubed.float()
    return partial.sum(dtype=torch.float64), grad.mul_(4)


def require_triton(x: torch.Tensor) -> None:
    """Raise ValueError unless a Triton kernel can take `x` here."""
    if triton is None:
        raise ValueError("triton is not installed; use backend='torch'")
    if not x.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"Triton kernels take CUDA tensors, not {x.device.type}; use backend='torch', "
                         "or set TRITON_INTERPRET=1 before Python starts")


def device_of(x: torch.Tensor):
    """Context in which Triton launches on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _check(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None, input_precision: str) -> None:
    if x.ndim != 2 or r.ndim != 2 or x.shape[1] != r.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and r {tuple(r.shape)}: [n, d] and [d, m] are needed")
    if x.dtype != r.dtype:
        raise ValueError(f"x is {x.dtype} and r {r.dtype}: give both one dtype")
    if x.dtype not in (*FUSED_DTYPES, torch.float64):  # a weight's cube underflows in float16
        raise ValueError(f"{x.dtype}: use float32, bfloat16 or float64")
    if weights is not None and weights.shape != x.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)}: one per row of x {tuple(x.shape)} is needed")
    if input_precision not in ("ieee", "tf32", "tf32x3"):
        raise ValueError(f"input_precision {input_precision!r}: use ieee, tf32 or tf32x3")


def tile_shape(dtype: torch.dtype, precision: str) -> tuple[int, int, int, int]:
    """Rows, columns and depth of the fused kernel's tile, and its warps."""
    if precision == "ieee" and dtype == torch.float32:  # FMA units: accumulators fill the registers
        return 64, 64, 16, 4
    return 128, 128, 128 // dtype.itemsize, 8


def _cube_fused(x, r, weights, n, d, m, precision):
    """w ∘ (X R)³ [n, m] in x's dtype, and float32 partial losses, one per tile."""
    rows, columns, depth, warps = tile_shape(x.dtype, precision)
    columns = min(columns, max(16, triton.next_power_of_2(m)))
    cubed = torch.empty((n, m), dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(n, rows) * triton.cdiv(m, columns)
    partial = torch.empty(tiles, dtype=torch.float32, device=x.device)
    _cube_matmul_kernel[(tiles,)](
        x, r, x if weights is None else weights, cubed, partial, n, m, *x.stride(), *r.stride(), D=d,
        WEIGHTED=weights is not None, PRECISION=precision, UPCAST=not x.is_cuda, ROWS=rows, COLUMNS=columns,
        DEPTH=depth, num_warps=warps, num_stages=3)
    return cubed, partial


def _cube_separate(x, r, weights, n, d, m, precision):
    """As `_cube_fused`, in place over torch's float32 product."""
    y = x @ r
    partial = torch.empty(triton.cdiv(y.numel(), _BLOCK), dtype=torch.float32, device=x.device)
    _cube_kernel[partial.shape](y, y if weights is None else weights, partial, y.numel(), m,
                                WEIGHTED=weights is not None, BLOCK=_BLOCK, num_warps=4)
    return y, partial


if triton is not None:
    @triton.jit
    def _cube_matmul_kernel(x, r, weights, cubed, partial, n, m, x_row, x_column, r_row, r_column,
                            D: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr,
                            UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                            DEPTH: tl.constexpr):
        tile = tl.program_id(0)
        across = tl.cdiv(m, COLUMNS)
        # Neighbouring programs share rows of X; offsets are 64-bit, as X may exceed 2³¹ elements.
        rows = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        columns = (tile % across).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH).to(tl.int64)
        x_tile = x + rows[:, None] * x_row + depth[None, :] * x_column
        r_tile = r + depth[:, None] * r_row + columns[None, :] * r_column
        y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        # D is a constant: models have few sizes, and Triton 3.6's interpreter cannot loop to a variable.
        for start in range(0, D, DEPTH):
            left = depth < D - start
            a = tl.load(x_tile, mask=(rows[:, None] < n) & left[None, :], other=0.0)
            b = tl.load(r_tile, mask=left[:, None] & (columns[None, :] < m), other=0.0)
            if UPCAST:  # the interpreter's dot takes bfloat16 for integers; its products fit float32
                a, b = a.to(tl.float32), b.to(tl.float32)
            y = tl.dot(a, b, y, input_precision=PRECISION)
            x_tile += DEPTH * x_column
            r_tile += DEPTH * r_row
        squared = y * y
        weighted = y
        if WEIGHTED:
            weighted = y * tl.load(weights + rows, mask=rows < n, other=0.0)[:, None]
        inside = (rows[:, None] < n) & (columns[None, :] < m)
        value = (weighted * squared).to(cubed.dtype.element_ty)
        tl.store(cubed + rows[:, None] * m + columns[None, :], value, mask=inside)
        tl.store(partial + tile, tl.sum(weighted * y * squared))

    @triton.jit
    def _cube_kernel(y, weights, partial, size, m, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < size
        value = tl.load(y + index, mask=inside, other=0.0)
        squared = value * value
        weighted = value
        if WEIGHTED:
            weighted = value * tl.load(weights + index // m, mask=inside, other=0.0)
        tl.store(y + index, weighted * squared, mask=inside)
        tl.store(partial + tl.program_id(0), tl.sum(weighted * value * squared))
