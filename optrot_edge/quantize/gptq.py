"""GPTQ (arXiv 2210.17323) onto frozen grids, with static act-order.

Hessians are factored in float64 where the device has it; columns are visited in order of falling
diag(H), scales never move, and the codes come back in the stored order. The loop over columns is
`kernels.gptq`: float64 in torch on a CPU, float32 in Triton on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optrot_edge.errors import InputError
from optrot_edge.kernels.gptq import BLOCK, solve_block
from optrot_edge.quantize.grids import Grid, GridParams

LEAF = 128  # triangular matrices up to this size are inverted by substitution
MOST_DAMPING = 1.0  # fraction of the mean diagonal up to which damping may grow: beyond it nothing of H is left


@dataclass
class PreparedHessian:
    """`upper` [in, in]: U with H⁻¹ = UᵀU in act-order; `order` [in]; `dead` [in] bool; `damp` in use
    (fraction of the mean diagonal); `escalations` how often it had to grow."""

    upper: torch.Tensor
    order: torch.Tensor
    dead: torch.Tensor
    damp: float
    escalations: int

    @property
    def column_cost(self) -> torch.Tensor:
        """D_j = 1 / U_jj² in stored order: what a unit rounding error in column j costs after feedback."""
        cost = torch.empty_like(self.upper[0])
        cost[self.order] = self.upper.diagonal() ** -2
        return cost

    def feedback_gain(self, hessian: torch.Tensor) -> float:
        """tr D / tr H over the columns that are not dead: the share of round-to-nearest's loss that GPTQ's feedback
        leaves (damping in D); 1 when all are dead."""
        live = ~self.dead
        total = float(hessian.diagonal()[live.to(hessian.device)].sum())
        return float(self.column_cost[live].sum()) / total if total > 0 else 1.0


def prepare_hessian(hessian: torch.Tensor, *, damp: float = 0.01, act_order: bool = True) -> PreparedHessian:
    """Factor H = E[xxᵀ] [in, in] for GPTQ.

    Dead columns (H_jj = 0) get H_jj = 1. Raises InputError for a non-finite Hessian and as `damped_cholesky` does.
    """
    if not hessian.isfinite().all():
        raise InputError("the Hessian of the calibration inputs is non-finite; the model overflows or is damaged")
    if hessian.device.type == "mps":  # Metal has neither float64 nor every factorisation
        hessian = hessian.cpu()
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(h), device=h.device)
    # From the last column to the first: H = VVᵀ with V upper triangular, and U = V⁻¹. One factorisation instead of
    # two, and H itself is never inverted.
    backwards = order.flip(0)
    lower, damp, escalations = damped_cholesky(h[backwards][:, backwards], damp)
    return PreparedHessian(_inverse_upper(lower.flip(0, 1)), order, dead, damp, escalations)


def damped_cholesky(h: torch.Tensor, damp: float) -> tuple[torch.Tensor, float, int]:
    """L with LLᵀ = H + damp · (mean diagonal) · I, the damping used and how often it had to grow.

    When the factorisation fails, damping grows tenfold, up to MOST_DAMPING; the count is for the report. Raises
    InputError for an `h` [n, n] that no damping repairs.
    """
    mean, escalations = float(h.diagonal().mean()) or 1.0, 0
    while True:
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower, damp, escalations
        if damp * 10 > MOST_DAMPING * (1 + 1e-9):
            raise InputError(f"the Hessian is not positive definite even with damping {damp:g}; "
                             "use more or other calibration text")
        damp, escalations = damp * 10, escalations + 1


def _inverse_upper(matrix: torch.Tensor) -> torch.Tensor:
    """Inverse of an upper triangular matrix, by halves: almost all of it is products."""
    size = len(matrix)
    if size <= LEAF:
        eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(matrix, eye, upper=True)
    half = size // 2
    inverse = torch.zeros_like(matrix)
    inverse[:half, :half] = _inverse_upper(matrix[:half, :half])
    inverse[half:, half:] = _inverse_upper(matrix[half:, half:])
    inverse[:half, half:] = inverse[:half, :half] @ matrix[:half, half:] @ inverse[half:, half:].neg()
    return inverse


def gptq(weight: torch.Tensor, prepared: PreparedHessian, grid: Grid, params: GridParams) -> torch.Tensor:
    """Codes uint8 [out, in] of `weight` [out, in] on `grid` with frozen `params`.

    Rows are independent, so matrices that read the same input may be stacked. On a GPU the residual and its
    updates are float32 (the factor stays float64 until here): tr ΔHΔᵀ moves by 1e-4 of itself at most
    (0.0005 dB; measured on a CPU at 2 to 8 bits, damping 0.1 and 0.001).
    """
    upper, order = prepared.upper, prepared.order
    work = torch.float32 if upper.is_cuda else upper.dtype
    columns, device = weight.shape[1], upper.device
    residual = weight.to(device).to(work).T[order].contiguous()  # [in, out]: a column is contiguous
    residual[prepared.dead[order]] = 0
    scales, offsets = (None if part is None else part.to(device) for part in params.columns())
    # A codebook's levels; every other grid is offset + scale · code, the offset being what code 0 stands for.
    levels = grid.spec.codebook
    levels = None if levels is None else torch.tensor(levels, dtype=work, device=device)
    origin = None if levels is not None else grid.values_of(torch.zeros_like(scales), scales, offsets).to(work)
    steps = scales.to(work)
    group = order // grid.spec.group_size
    codes = torch.empty(residual.shape, dtype=torch.uint8, device=device)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        feedback = (upper[first:last, first:] / upper.diagonal()[first:last, None]).to(work)
        codes[first:last], errors = solve_block(residual[first:last], feedback[:, :last - first], steps, origin,
                                                group[first:last], top=grid.top, levels=levels)
        if last < columns:
            residual[last:].addmm_(feedback[:, last - first:].T, errors, alpha=-1)
    _neutralise(codes, group, grid, scales, offsets)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous().to(weight.device)


def _neutralise(codes: torch.Tensor, group: torch.Tensor, grid: Grid, scales: torch.Tensor, offsets) -> None:
    """Give weights whose scale is 0 the code that the grid itself gives them: all of its codes mean the same."""
    empty = scales == 0
    if empty.any():
        neutral = grid.codes_of(torch.zeros_like(scales), scales, offsets).to(torch.uint8)
        torch.where(empty[group], neutral[group], codes, out=codes)
