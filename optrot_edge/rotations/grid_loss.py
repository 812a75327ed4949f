"""OptRot+'s loss of one matrix on a block grid, and its closed-form gradients.

With `H + λI = (I+U) D (I+U)ᵀ`, H = E[xxᵀ], λ GPTQ's damping and U strictly upper in the order in which GPTQ
visits the columns, rounding errors η_ij leave `η (I+U)⁻¹` in the weights, and the loss of unclipped GPTQ is
`Σ_ij g_i C_j η_ij²`, C the diagonal of `(I+U)⁻¹ H (I+U)⁻ᵀ` and g the weight of output row i. Without damping C is D
(GPTQ, arXiv 2210.17323; LDLQ in QuIP, arXiv 2307.13304); with it D would count the damping as a loss. Rounding errors
are uniform on a step, and all weights of a row in one block share a step, so the loss to expect is

    L = 1/12 Σ_blocks Σ_i g_i step_ib² S_b f_b,  S_b = Σ_{j∈b} C_j,  f_b = (n_b − 1) / (n_b − 1 + c).

The step follows the block's range; a p-norm stands for the maximum, as the stored scales are least-squares
fits that clip a little. f_b is what the fit gains: where few columns, n_b = S_b² / Σ_{j∈b} C_j² in effect, carry a
block's cost, the fit lays an affine grid so that those columns round well (c = 3.5). One parameter, the scale of a
symmetric grid, does not reach far: there c = 0. The common factor of the step (1 / levels) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

POWER = 8  # of the norm that stands for a block's maximum
FITTED = {"affine": 3.5, "symmetric": 0.0}  # c, see benchmarks/grid_loss.py


def block_loss(weight: torch.Tensor, row_weights: torch.Tensor, cost: torch.Tensor, group_size: int, *,
               affine: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of `weight` [m, n] with `row_weights` [m] and column costs `cost` [n], n a multiple of group_size.

    `affine` grids spend their levels on max − min of a block, symmetric ones on twice max|w|. Returns the
    loss (scalar) and its gradients with respect to `weight` [m, n], `cost` [n] and `row_weights` [m].
    """
    blocks = weight.view(len(weight), -1, group_size)
    per_block, slope_cost = fitted_cost(cost.view(-1, group_size), FITTED["affine" if affine else "symmetric"])
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
    return (along @ per_block, gradient.view_as(weight), (along[:, None] * slope_cost).flatten(),
            spread.square() @ per_block)


def fitted_cost(cost: torch.Tensor, fitted: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`S f` of each block of `cost` [blocks, group] and its slope [blocks, group]."""
    if not fitted:
        return cost.sum(1), torch.ones_like(cost)
    total = cost.sum(1, keepdim=True).clamp_min(1e-30)
    shares = cost / total
    held = shares.square().sum(1, keepdim=True)  # 1 / n, at most 1
    below = 1 + (fitted - 1) * held
    gain = (1 - held) / below
    slope = gain - 2 * fitted / below.square() * (shares - held)
    return (total * gain).squeeze(1), slope


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
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The plain form `Σ_j C_j · ‖W‖₄²` (tr D · ‖W‖₄² without damping), scaled by the mean row weight; returns as
    `block_loss`."""
    scale = row_weights.mean()
    squared = weight * weight
    norm = (squared * squared).sum().sqrt().clamp_min(1e-30)  # ‖W‖₄²
    total = cost.sum()
    gradient = (2 * scale * total / norm) * squared * weight
    return (scale * total * norm, gradient, (scale * norm).expand_as(cost),
            (total * norm / len(weight)).expand(len(weight)))


@dataclass
class ColumnCost:
    """`cost` [n]: C_j in stored order for a covariance; `gradient` pulls weights on it back to the covariance."""

    cost: torch.Tensor
    inverse: torch.Tensor  # (I+U)⁻¹, in GPTQ's order
    pivots: torch.Tensor  # D, in GPTQ's order
    order: torch.Tensor
    damp: float
    added: torch.Tensor  # to H's diagonal: damp times its mean

    def gradient(self, weights: torch.Tensor) -> torch.Tensor:
        """∂(Σ_j weights_j C_j)/∂H [n, n], symmetric, the order of columns held fixed.

        With A = (I+U)⁻¹, w the weights and λ the damping, C_j = D_j − λ(AAᵀ)_jj; D contributes AᵀdiagwA, and
        AAᵀ, which H moves through U, `Aᵀ(X + Xᵀ)A` with X_ij = −(AAᵀ)_ij w_i / D_j for i < j, else 0.
        λ follows the mean of H's diagonal. Computed in the dtype of `weights`.
        """
        a, w = self.inverse.to(weights), weights[self.order]
        gram = a @ a.T
        inner = (w[:, None] * gram / self.pivots.to(w)).triu(1)
        inner = self.added.to(w) * (inner + inner.T)
        inner.diagonal().add_(w)
        inner = a.T @ inner @ a
        back = self.order.argsort()
        gradient = inner[back][:, back]
        by_damping = inner.diagonal().sum() - w @ gram.diagonal()
        gradient.diagonal().add_(self.damp * by_damping / len(w))
        return gradient


def column_cost(hessian: torch.Tensor, damp: float) -> ColumnCost:
    """C of `hessian` [n, n] (symmetric, ≥ 0): what an error that GPTQ makes in a column costs in the end.

    GPTQ sees H damped and its columns by falling diagonal: `H + λI = (I+U) D (I+U)ᵀ`. Independent rounding errors η
    leave `η (I+U)⁻¹` in the weights, whose cost on the true H is `Σ_j η_j² C_j`, C the diagonal of
    `(I+U)⁻¹ H (I+U)⁻ᵀ`; without damping C = D. Costs one Cholesky factorisation in the dtype of `hessian`, of the
    matrix turned upside down, since its upper factor is wanted, and an inverse of the factor.
    Raises torch.linalg.LinAlgError if damping does not make it positive definite.
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order]
    added = damp * h.diagonal().mean()
    h.diagonal().add_(added)
    upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    root = upper.diagonal()
    inverse = torch.linalg.solve_triangular(upper / root, torch.eye(len(h), dtype=h.dtype, device=h.device),
                                            upper=True, unitriangular=True)
    pivots = root.square()
    cost = torch.empty_like(root)
    cost[order] = (pivots - added * inverse.square().sum(1)).clamp_min(0)
    return ColumnCost(cost, inverse, pivots, order, damp, added)
