"""GPTQ inside one block of columns: round a column, hand its error on to the later ones, next column.

Columns are the first axis, so a column of all rows is contiguous. Where H⁻¹ = UᵀU, `feedback` is U with every row
divided by its diagonal entry: errors are then plain rounding errors, and nothing is divided in the loop.
"""

from __future__ import annotations

import torch

from optrot_edge.kernels.launch import device_of, require_triton, runs_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # see launch.py
    triton = None

BLOCK = 128  # columns that the kernel holds; the trailing update beyond them is the caller's GEMM
_INNER = 16  # columns between two products inside the kernel; Triton's products start at 16
_TWIN_INNER = 32  # the same in the twin: their errors stay in a CPU's cache
# Rows of a program, one to a thread of its only warp: a row's columns then never leave their thread, and 4096 rows
# still fill a large GPU.
_ROWS = 32


def solve_block(residual: torch.Tensor, feedback: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor | None,
                group: torch.Tensor, *, top: int, levels: torch.Tensor | None = None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and rounding errors of one block of columns, in GPTQ's order (arXiv 2210.17323, algorithm 1).

    `residual` [columns, rows] holds the weights less all feedback from earlier blocks; `feedback` [columns, columns]
    is U_jk / U_jj above the diagonal (nothing else of it is read); `scales` and `offsets` [groups, rows], looked up
    by `group` [columns] (integers). Column j is rounded to the nearest of `offsets + scales · q`, q = 0 … `top`, where
    no offset means 0, or to the nearest of `scales · levels[q]` with ascending `levels` [top + 1] (then without
    offsets); what it misses, times feedback[j, k], comes off every later column k.

    Returns codes, uint8, and errors in the residual's dtype, both [columns, rows]; the caller owes the columns k
    beyond the block `residual[k] -= Σ_j errors[j] · U_jk / U_jj`. Where a scale is 0 every code means the offset
    and the code is arbitrary. Scales may be negative. The inputs are left alone.
    Runs in Triton on CUDA (float32, up to 128 columns), else in torch. Raises ValueError on what does not fit.
    """
    fits = runs_triton(residual, (torch.float32,)) and len(residual) <= BLOCK
    function = solve_block_triton if fits else solve_block_torch
    return function(residual, feedback, scales, offsets, group, top=top, levels=levels)


@torch.no_grad()
def solve_block_torch(residual: torch.Tensor, feedback: torch.Tensor, scales: torch.Tensor,
                      offsets: torch.Tensor | None, group: torch.Tensor, *, top: int,
                      levels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The twin of `solve_block_triton`, in the residual's dtype; any number of columns. See `solve_block`."""
    _check(residual, feedback, scales, offsets, group, top, levels)
    columns = len(residual)
    w = residual.clone() if offsets is None else residual - offsets[group]
    errors, rounded = torch.empty_like(w), torch.empty_like(w)
    steps = scales[group]
    divisors = torch.where(steps == 0, torch.inf, steps)
    middles = None if levels is None else (levels[1:] + levels[:-1]) / 2
    turned = feedback.T.contiguous()  # row k: what column k takes of every error
    # Lists of views: indexing a tensor costs as much as a small operation.
    columns_of = [t.unbind() for t in (w, rounded, errors, steps, divisors)]
    for first in range(0, columns, _TWIN_INNER):
        last = min(first + _TWIN_INNER, columns)
        for j in range(first, last):
            x, code, error, step, divisor = (views[j] for views in columns_of)
            if j > first:
                torch.addmv(x, errors[first:j].T, turned[j, first:j], alpha=-1, out=x)
            torch.div(x, divisor, out=code)
            if levels is None:
                value = code.round_().clamp_(0, top)
            else:
                index = torch.bucketize(code, middles)
                code.copy_(index)
                value = levels[index]
            torch.addcmul(x, value, step, value=-1, out=error)
        if last < columns:
            w[last:].addmm_(turned[last:, first:last], errors[first:last], alpha=-1)
    return rounded.to(torch.uint8), errors


@torch.no_grad()
def solve_block_triton(residual: torch.Tensor, feedback: torch.Tensor, scales: torch.Tensor,
                       offsets: torch.Tensor | None, group: torch.Tensor, *, top: int,
                       levels: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """`solve_block` of CUDA tensors (or, under TRITON_INTERPRET=1, CPU ones): float32, at most 128 columns.

    A program keeps 32 rows of the block in registers. Inside it works in two levels: 16 columns one by one, then
    one float32 product for the rest of the block. Sums are in another order than the twin's.
    """
    _check(residual, feedback, scales, offsets, group, top, levels)
    require_triton(residual)
    columns, rows = residual.shape
    if residual.dtype != torch.float32 or columns > BLOCK:
        raise ValueError(f"{columns} columns of {residual.dtype}: the Triton kernel takes up to {BLOCK} of float32; "
                         "use solve_block_torch")
    residual, scales = residual.contiguous(), scales.contiguous()
    feedback = feedback if feedback.stride(1) == 1 else feedback.contiguous()
    group = group.to(torch.int32).contiguous()
    codes = torch.empty(residual.shape, dtype=torch.uint8, device=residual.device)
    errors = torch.empty_like(residual)
    if residual.numel():
        with device_of(residual):
            _solve_kernel[(triton.cdiv(rows, _ROWS),)](
                residual, feedback, scales, scales if offsets is None else offsets.contiguous(), group,
                scales if levels is None else levels.contiguous(), codes, errors, rows, columns, feedback.stride(0),
                TOP=top, OFFSETS=offsets is not None, CODEBOOK=levels is not None, BLOCK=BLOCK, INNER=_INNER,
                ROWS=_ROWS, num_warps=_ROWS // 32)
    return codes, errors


def _check(residual, feedback, scales, offsets, group, top, levels) -> None:
    """ValueError unless shapes, dtypes and devices of a block fit together."""
    if residual.ndim != 2 or residual.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"residual is {residual.dtype} {tuple(residual.shape)}: [columns, rows] in float32 or "
                         "float64 is needed")
    columns, rows = residual.shape
    if feedback.shape != (columns, columns) or group.shape != (columns,):
        raise ValueError(f"feedback {tuple(feedback.shape)} and group {tuple(group.shape)}: [{columns}, {columns}] "
                         f"and [{columns}] are needed for {columns} columns")
    if scales.ndim != 2 or scales.shape[1] != rows or (offsets is not None and offsets.shape != scales.shape):
        raise ValueError(f"scales {tuple(scales.shape)} and offsets "
                         f"{None if offsets is None else tuple(offsets.shape)}: [groups, {rows}] are needed")
    if not 1 <= top <= 255:
        raise ValueError(f"top {top}: codes are bytes, so the largest is 1 to 255")
    if levels is not None and (offsets is not None or levels.shape != (top + 1,)):
        raise ValueError(f"levels {tuple(levels.shape)}: [{top + 1}] and no offsets are needed with a codebook")
    for name, tensor in (("feedback", feedback), ("scales", scales), ("offsets", offsets), ("levels", levels)):
        if tensor is not None and (tensor.dtype, tensor.device) != (residual.dtype, residual.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}: the residual's {residual.dtype} on "
                             f"{residual.device} is needed")


if triton is not None:
    @triton.jit
    def _residual_part(residual, offsets, group, first, row, rows, columns, OFFSETS: tl.constexpr, INNER: tl.constexpr):
        """INNER columns from `first` on, less their offsets; zeros beyond the block."""
        column = first + tl.arange(0, INNER)
        here = (column[:, None] < columns) & (row[None, :] < rows)
        part = tl.load(residual + column[:, None].to(tl.int64) * rows + row[None, :], mask=here, other=0.0)
        if OFFSETS:
            lookup = tl.load(group + column, mask=column < columns, other=0).to(tl.int64)
            part -= tl.load(offsets + lookup[:, None] * rows + row[None, :], mask=here, other=0.0)
        return part

    @triton.jit
    def _step_of(scales, group, column, row, rows, columns):
        """Scales [ROWS] of one column; zeros beyond the block."""
        lookup = tl.load(group + column, mask=column < columns, other=0).to(tl.int64)
        return tl.load(scales + lookup * rows + row, mask=(row < rows) & (column < columns), other=0.0)

    @triton.jit
    def _feedback_of(feedback, column, first, columns, stride, INNER: tl.constexpr):
        """What `column` passes on to the INNER columns from `first` on; zeros up to itself and beyond the block."""
        later = first + tl.arange(0, INNER)
        return tl.load(feedback + column * stride + later, mask=(later > column) & (later < columns), other=0.0)

    # `rows` unspecialised: where Triton knows it for a multiple of 16 it loads four rows to a thread and spreads a
    # row's columns over several, which then have to exchange every sum.
    @triton.jit(do_not_specialize=["rows"])
    def _solve_kernel(residual, feedback, scales, offsets, group, levels, codes, errors, rows, columns, stride,
                      TOP: tl.constexpr, OFFSETS: tl.constexpr, CODEBOOK: tl.constexpr, BLOCK: tl.constexpr,
                      INNER: tl.constexpr, ROWS: tl.constexpr):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        lane = tl.arange(0, BLOCK)
        inner = tl.arange(0, INNER)
        owed = tl.zeros((BLOCK, ROWS), dtype=tl.float32)  # feedback that every column has yet to take
        part = _residual_part(residual, offsets, group, 0, row, rows, columns, OFFSETS, INNER)
        for first in range(0, BLOCK, INNER):
            chosen = (tl.arange(0, BLOCK // INNER) * INNER == first)[:, None, None]
            part -= tl.sum(tl.where(chosen, tl.reshape(owed, (BLOCK // INNER, INNER, ROWS)), 0.0), axis=0)
            error = tl.zeros((INNER, ROWS), dtype=tl.float32)
            next_step = _step_of(scales, group, first, row, rows, columns)
            next_u = _feedback_of(feedback, first, first, columns, stride, INNER)
            for j in range(INNER):
                column = first + j
                step, u = next_step, next_u
                # Asked for a column ahead: the chain of roundings below never waits for memory.
                next_step = _step_of(scales, group, column + 1, row, rows, columns)
                next_u = _feedback_of(feedback, column + 1, first, columns, stride, INNER)
                x = tl.sum(tl.where(inner[:, None] == j, part, 0.0), axis=0)
                # Correctly rounded, as torch divides: an approximate quotient would tip some halves over.
                t = tl.where(step == 0.0, 0.0, tl.div_rn(x, tl.where(step == 0.0, 1.0, step)))
                if CODEBOOK:
                    code = tl.zeros((ROWS,), dtype=tl.int32)
                    below = tl.load(levels)
                    value = tl.zeros((ROWS,), dtype=tl.float32) + below
                    for k in range(TOP):
                        above = tl.load(levels + k + 1)
                        past = t > (above + below) / 2
                        code += past.to(tl.int32)
                        value = tl.where(past, above, value)
                        below = above
                else:
                    value = tl.minimum(tl.maximum(t, 0.0), TOP)
                    value = (value + 12582912.0) - 12582912.0  # 1.5 · 2²³: float32's own rounding, halves to even
                    code = value.to(tl.int32)
                e = x - value * step
                part -= u[:, None] * e[None, :]
                error = tl.where(inner[:, None] == j, e[None, :], error)
                place = column.to(tl.int64) * rows + row
                valid = (row < rows) & (column < columns)
                tl.store(codes + place, code.to(tl.uint8), mask=valid)
                tl.store(errors + place, e, mask=valid)
            rest = (lane[:, None] >= first + INNER) & (lane[:, None] < columns)
            u = tl.load(feedback + (first + inner)[None, :] * stride + lane[:, None], mask=rest, other=0.0)
            owed = tl.dot(u, error, owed, input_precision="ieee")
            # Read after the product: Triton takes the layout of what follows from the last load or product, and a
            # product's would spread a row's columns over several threads.
            part = _residual_part(residual, offsets, group, first + INNER, row, rows, columns, OFFSETS, INNER)
