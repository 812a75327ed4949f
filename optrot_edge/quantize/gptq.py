"""GPTQ (arXiv 2210.17323) onto frozen grids, with static act-order.

Everything is done in float64 where the device has it; columns are visited in order of falling
diag(H), scales never move, and the codes come back in the stored order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optrot_edge.errors import InputError
from optrot_edge.quantize.grids import Grid, GridParams

BLOCK = 128  # columns between two trailing GEMM updates
MAX_ESCALATIONS = 2  # times the damping may grow tenfold


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
        """tr D / tr H: the share of round-to-nearest's loss that GPTQ's feedback leaves (damping in D)."""
        return float(self.column_cost.sum()) / max(float(hessian.diagonal().sum()), 1e-30)


def prepare_hessian(hessian: torch.Tensor, *, damp: float = 0.01, act_order: bool = True) -> PreparedHessian:
    """Factor H = E[xxᵀ] [in, in] for GPTQ.

    Dead columns (H_jj = 0) get H_jj = 1. When the Cholesky factorisation fails, damping grows tenfold, at
    most twice (beyond the mean diagonal nothing of H is left); the count is returned for the report.
    Raises InputError for a non-finite Hessian or one that no damping repairs.
    """
    if not hessian.isfinite().all():
        raise InputError("calibration produced non-finite activations; the model overflows or is damaged")
    if hessian.device.type == "mps":  # Metal has neither float64 nor every factorisation
        hessian = hessian.cpu()
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(len(h), device=h.device)
    h = h[order][:, order]
    mean = float(h.diagonal().mean())
    for escalation in range(MAX_ESCALATIONS + 1):
        damped = h.clone()
        damped.diagonal().add_(damp * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed:
            return PreparedHessian(upper, order, dead, damp, escalation)
        damp *= 10
    raise InputError(f"the Hessian is not positive definite even with damping {damp / 10:g}; "
                     "use more or other calibration text")


def gptq(weight: torch.Tensor, prepared: PreparedHessian, grid: Grid, params: GridParams) -> torch.Tensor:
    """Codes uint8 [out, in] of `weight` [out, in] on `grid` with frozen `params`.

    Rows are independent, so matrices that read the same input may be stacked.
    """
    work = prepared.upper.dtype
    columns = weight.shape[1]
    upper, order = prepared.upper, prepared.order
    residual = weight.to(upper.device).to(work).T[order].contiguous()  # [in, out]: a column is contiguous
    residual[prepared.dead[order]] = 0
    scales, offsets = params.columns()
    scales = scales.to(upper.device)
    offsets = None if offsets is None else offsets.to(upper.device)
    group = (order // grid.spec.group_size).tolist()
    codes = torch.empty(residual.shape, dtype=torch.uint8, device=upper.device)
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.zeros(last - first, residual.shape[1], dtype=work, device=upper.device)
        corner = upper[first:last, first:last]
        for j in range(last - first):
            w = residual[first + j]
            if j:
                w = torch.addmv(w, errors[:j].T, corner[:j, j], alpha=-1)
            scale = scales[group[first + j]]
            offset = None if offsets is None else offsets[group[first + j]]
            q = grid.codes_of(w, scale, offset)
            codes[first + j] = q
            errors[j] = (w - grid.values_of(q, scale, offset)) / corner[j, j]
        if last < columns:
            residual[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous().to(weight.device)
