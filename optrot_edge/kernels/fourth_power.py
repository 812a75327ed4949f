"""OptRot's objective and its closed-form gradient: two GEMMs with a cubing between them.

For `Y = X R` and row weights `w`: `f = Σ_i w_i Σ_j Y_ij⁴` and `∇_R f = 4 Xᵀ (w ∘ Y³)`.

`precision` says how float32 inputs are multiplied; sums are float32 in every case:

* "ieee": everything in float32. Exact to rounding, and slow: no tensor cores.
* "tf32": X and R rounded to tf32 (11 bits) for `X R`; X and `w ∘ Y³` to bfloat16 (8 bits, float32's
  range: a weight of 1e-2 cubed is 1e-6) for the gradient. Loss within 3e-4 and gradient within 4e-3 of exact.
* "bf16": X and R are rounded to bfloat16 for both products; what bfloat16 inputs mean. Loss within 1e-3,
  gradient within 2e-2.

These are relative (Frobenius) errors of a hundred rows or more: roundings are to nearest, so they average out.
The last two precisions never write `Y` or `Y³` in full precision.
"""

from __future__ import annotations

import torch

from optrot_edge.kernels.launch import device_of, require_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # see launch.py
    triton = None

FUSED_DTYPES = (torch.float32, torch.bfloat16)
PRECISIONS = ("ieee", "tf32", "bf16")
TENSOR_CORES = (8, 0)  # compute capability from which there is tf32 and bfloat16
_TWIN_ROWS = 2048  # rows per slice of the twin: Y and Y³ of a slice stay in cache on a CPU
_BLOCK = 4096  # elements of Y per program of the unfused kernel
_GROUP = 8  # tiles of rows that share a tile of R's columns before the next is fetched


def fourth_power(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None, *,
                 backend: str = "auto", precision: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`Σ_i w_i Σ_j (X R)_ij⁴` and its gradient with respect to `R`.

    `x` is [n, d], `r` [d, m], `weights` [n] or None (all ones); `x` and `r` share one dtype, and x
    may be a transposed view. Returns the loss (float64 scalar) and the gradient [d, m], float32
    for bfloat16 inputs and otherwise in the inputs' dtype. `backend` is "auto" (Triton for float32
    and bfloat16 on CUDA from sm_80 on, else torch), "torch" or "triton". `precision` None is "tf32"
    for float32 in Triton and "ieee" in torch; the module's docstring says what each costs.
    Raises ValueError on shapes, dtypes or a precision that do not fit, or a backend that cannot run here.
    """
    if backend == "auto":
        fused = (triton is not None and x.is_cuda and x.dtype in FUSED_DTYPES
                 and torch.cuda.get_device_capability(x.device) >= TENSOR_CORES)
        backend = "triton" if fused else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend {backend!r}: use auto, torch or triton")
    return (fourth_power_triton if backend == "triton" else fourth_power_torch)(x, r, weights, precision=precision)


@torch.no_grad()
def fourth_power_torch(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None, *,
                       precision: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `fourth_power_triton`, and what it means: see `fourth_power`.

    Rounds where the kernel rounds and multiplies in the working dtype (float32, or float64 for float64
    inputs); row sums are added up in float64. `precision` None is "ieee" for float32.
    """
    precision = _checked(x, r, weights, precision, "ieee")
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    home = "cpu" if x.device.type == "mps" else x.device  # Apple GPUs have no float64
    step = _TWIN_ROWS if x.device.type == "cpu" else max(len(x), 1)
    loss = torch.zeros((), dtype=torch.float64, device=home)
    grad = torch.zeros(r.shape, dtype=work, device=r.device)
    rotation = _rounded(r, precision).to(work)
    for start in range(0, len(x), step):
        rows = x[start:start + step]
        y = _rounded(rows, precision).to(work) @ rotation
        squared = y * y
        sums = torch.einsum("ij,ij->i", squared, squared)
        cubed = y.mul_(squared)
        if weights is not None:
            weight = weights[start:start + step].to(work)
            sums = sums * weight
            cubed.mul_(weight[:, None])
        loss += sums.to(home).sum(dtype=torch.float64)
        if precision != "ieee":
            rows, cubed = rows.bfloat16(), cubed.bfloat16()
        grad.addmm_(rows.to(work).T, cubed.to(work))
    return loss, grad.mul_(4)


@torch.no_grad()
def fourth_power_triton(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None = None, *,
                        precision: str | None = None,
                        fused: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`fourth_power` with its cubing, weighting and loss in a Triton kernel.

    `fused` True does them in the epilogue of a Triton `X R`, False in one pass over torch's `X R`
    ("ieee" only). None picks False for "ieee", where the product runs on the FMA units and cuBLAS is
    hard to match, and True otherwise. `Xᵀ (w ∘ Y³)` is torch's product; at "ieee" it, like the unfused
    `X R`, follows torch's own precision setting. `precision` None is "tf32" for float32.
    Takes CUDA tensors; CPU tensors too when triton was imported under TRITON_INTERPRET=1.
    """
    precision = _checked(x, r, weights, precision, "tf32")
    require_triton(x)
    if x.dtype not in FUSED_DTYPES:
        raise ValueError(f"the Triton kernel takes float32 or bfloat16, not {x.dtype}; use backend='torch'")
    if fused is None:
        fused = precision != "ieee"
    if not fused and precision != "ieee":
        raise ValueError(f"fused=False writes Y in full precision; at {precision} it is never written")
    (n, d), m = x.shape, r.shape[1]
    if n == 0:
        return torch.zeros((), dtype=torch.float64, device=x.device), torch.zeros_like(r, dtype=torch.float32)
    weights = None if weights is None else weights.to(torch.float32).contiguous()
    narrow = x if precision == "ieee" else x.bfloat16()
    with device_of(x):
        if fused:
            left = narrow if precision == "bf16" else x
            cubed, partial = _cube_fused(left, _rounded(r, precision), weights, n, d, m, precision)
        else:
            cubed, partial = _cube_separate(x, r, weights, n, d, m)
        if precision == "ieee":
            grad = x.T @ cubed
        elif x.is_cuda:
            grad = torch.mm(narrow.T, cubed, out_dtype=torch.float32)
        else:
            grad = narrow.T.float() @ cubed.float()
    return partial.sum(dtype=torch.float64), grad.mul_(4)


def _checked(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor | None, precision: str | None,
             default: str) -> str:
    """The precision meant; ValueError on inputs that do not fit. `default` is float32's."""
    if x.ndim != 2 or r.ndim != 2 or x.shape[1] != r.shape[0]:
        raise ValueError(f"x {tuple(x.shape)} and r {tuple(r.shape)}: [n, d] and [d, m] are needed")
    if x.dtype != r.dtype:
        raise ValueError(f"x is {x.dtype} and r {r.dtype}: give both one dtype")
    if x.dtype not in (*FUSED_DTYPES, torch.float64):  # a weight's cube underflows in float16
        raise ValueError(f"{x.dtype}: use float32, bfloat16 or float64")
    if weights is not None and weights.shape != x.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)}: one per row of x {tuple(x.shape)} is needed")
    if x.dtype == torch.float32:
        allowed = PRECISIONS
    else:
        allowed = ("bf16",) if x.dtype == torch.bfloat16 else ("ieee",)
        default = allowed[0]
    if precision not in (None, *allowed):
        raise ValueError(f"precision {precision!r} for {x.dtype}: use {' or '.join(allowed)}")
    return precision or default


def _rounded(matrix: torch.Tensor, precision: str) -> torch.Tensor:
    """`matrix` as the product `X R` reads it."""
    if precision == "bf16":
        return matrix.bfloat16()
    if precision == "tf32":  # tensor cores would cut the last 13 bits off: half a place more rounds instead
        return ((matrix.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return matrix


def tile_shape(precision: str) -> tuple[int, int, int, int]:
    """Rows, columns and depth of the fused kernel's tile, and its warps."""
    if precision == "ieee":  # FMA units: accumulators fill the registers
        return 64, 64, 16, 4
    return 128, 128, 64 if precision == "bf16" else 32, 8


def _cube_fused(x, r, weights, n, d, m, precision):
    """w ∘ (X R)³ [n, m], bfloat16 unless "ieee", and float32 partial losses, one per tile."""
    rows, columns, depth, warps = tile_shape(precision)
    columns = min(columns, max(16, triton.next_power_of_2(m)))
    if precision == "tf32":  # Hopper's tf32 product reads its right side along the depth
        r = r.T.contiguous().T
    cubed = torch.empty((n, m), dtype=torch.float32 if precision == "ieee" else torch.bfloat16, device=x.device)
    tiles = triton.cdiv(n, rows) * triton.cdiv(m, columns)
    partial = torch.empty(tiles, dtype=torch.float32, device=x.device)
    _cube_matmul_kernel[(tiles,)](
        x, r, x if weights is None else weights, cubed, partial, n, m, *x.stride(), *r.stride(), D=d,
        WEIGHTED=weights is not None, PRECISION="tf32" if precision == "tf32" else "ieee",
        UPCAST=not x.is_cuda, ROWS=rows, COLUMNS=columns, DEPTH=depth, GROUP=_GROUP, num_warps=warps, num_stages=3)
    return cubed, partial


def _cube_separate(x, r, weights, n, d, m):
    """As `_cube_fused` at "ieee", in place over torch's product."""
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
                            DEPTH: tl.constexpr, GROUP: tl.constexpr):
        tile = tl.program_id(0)
        # Neighbouring programs take GROUP tiles of rows by a few of columns, which the L2 cache holds.
        down = tl.cdiv(n, ROWS)
        group = tile // (GROUP * tl.cdiv(m, COLUMNS))
        height = tl.minimum(down - group * GROUP, GROUP)
        within = tile % (GROUP * tl.cdiv(m, COLUMNS))
        # Offsets are 64-bit, as X may exceed 2³¹ elements.
        rows = (group * GROUP + within % height).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        columns = (within // height).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH).to(tl.int64)
        x_tile = x + rows[:, None] * x_row + depth[None, :] * x_column
        r_tile = r + depth[:, None] * r_row + columns[None, :] * r_column
        y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        # D is a constant: models have few sizes, and Triton 3.6's interpreter cannot loop to a variable.
        for start in range(0, D, DEPTH):
            left = depth < D - start
            a = tl.load(x_tile, mask=(rows[:, None] < n) & left[None, :], other=0.0)
            b = tl.load(r_tile, mask=left[:, None] & (columns[None, :] < m), other=0.0)
            if PRECISION == "tf32":  # see _rounded, which has done the same to R
                a = ((a.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
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
