"""OptRot+'s loss of one matrix on a block grid, and its closed-form gradients.

With `H = E[xxᵀ] = (I+U) D (I+U)ᵀ`, U strictly upper in the order in which GPTQ visits the columns, the
loss of unclipped GPTQ is `Σ_ij g_i D_j η_ij²`, η the rounding errors and g the weight of output row i
(GPTQ, arXiv 2210.17323; LDLQ in QuIP, arXiv 2307.13304). Rounding errors are uniform on a step, and all
weights of a row in one block share a step, so the loss to expect is

    L = 1/12 Σ_blocks Σ_i g_i step_ib² Σ_{j∈b} D_j.

The step follows the block's range; a p-norm stands for the maximum, as the stored scales are least-squares
fits that clip a little. The common factor of the step (1 / levels) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

POWER = 8  # of the norm that stands for a block's maximum: 4, 8 and 16 predict the GPTQ loss alike


def block_loss(weight: torch.Tensor, row_weights: torch.Tensor, cost: torch.Tensor, group_size: int, *,
               affine: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of `weight` [m, n] with `row_weights` [m] and column costs `cost` [n], n a multiple of group_size.

    `affine` grids spend their levels on max − min of a block, symmetric ones on twice max|w|. Returns the
    loss (scalar) and its gradients with respect to `weight` [m, n] and `cost` [n].
    """
    blocks = weight.view(len(weight), -1, group_size)
    per_block = cost.view(-1, group_size).sum(1)
    if affine:
        low, high = blocks.clamp_max(0), blocks.clamp_min(0)
        below, slope_below = _smooth_max(-low)
        above, slope_above = _smooth_max(high)
        spread = below + above
        slope = slope_above - slope_below
    else:
        size, slope = _smooth_max(blocks.abs())
        spread, slope = 2 * size, 2 * slope * blocks.sign()
    weighted = row_weights[:, None] * spread
    along = (weighted * spread).sum(0)  # Σ_i g_i step² of each block
    gradient = (2 * weighted * per_block)[..., None] * slope
    return along @ per_block, gradient.view_as(weight), along.repeat_interleave(group_size)


def _smooth_max(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ x^p)^(1/p) over the last axis of x ≥ 0 and its slope with respect to x."""
    top = x.amax(-1, keepdim=True).clamp_min(1e-30)
    ratio = x / top
    square = ratio * ratio
    sixth = square * square * square
    total = (sixth * square).sum(-1, keepdim=True).clamp_min(1e-30)
    norm = total.pow(1 / POWER)
    return (top * norm).squeeze(-1), sixth * ratio * (norm / total)


def plain_loss(weight: torch.Tensor, row_weights: torch.Tensor, cost: torch.Tensor) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain form `tr D · ‖W‖₄²`, scaled by the mean row weight; returns as `block_loss`."""
    scale = row_weights.mean()
    squared = weight * weight
    norm = (squared * squared).sum().sqrt().clamp_min(1e-30)  # ‖W‖₄²
    total = cost.sum()
    gradient = (2 * scale * total / norm) * squared * weight
    return scale * total * norm, gradient, (scale * norm).expand_as(cost)


@dataclass
class ColumnCost:
    """`cost` [n]: D_j in stored order for a covariance; `gradient` pulls weights on D back to it."""

    cost: torch.Tensor
    unit: torch.Tensor  # I + U, in GPTQ's order
    order: torch.Tensor
    damp: float

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """∂(Σ_j weights_j D_j)/∂H [n, n], symmetric, the order of columns held fixed.

        `(I+U)^{-T} diag(weights) (I+U)^{-1}`, and what the damping, a share of H's mean diagonal, adds.
        """
        inverse = torch.linalg.solve_triangular(
            self.unit, torch.eye(len(self.unit), dtype=self.unit.dtype, device=self.unit.device),
            upper=True, unitriangular=True)
        inner = inverse.T @ (weights.to(inverse)[self.order, None] * inverse)
        back = self.order.argsort()
        gradient = inner[back][:, back]
        gradient.diagonal().add_(self.damp * gradient.diagonal().mean())
        return gradient


def column_cost(hessian: torch.Tensor, damp: float) -> ColumnCost:
    """D of `hessian` [n, n] (symmetric, ≥ 0) as GPTQ would see it: damped, columns by falling diagonal.

    Costs one Cholesky factorisation in the dtype of `hessian`: of the matrix turned upside down, since its
    upper factor is wanted. Raises torch.linalg.LinAlgError if damping does not make it positive definite.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    root = upper.diagonal()
    cost = torch.empty_like(root)
    cost[order] = root.square()
    return ColumnCost(cost, upper / root, order, damp)
