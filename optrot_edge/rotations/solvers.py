"""Steps on the orthogonal group for OptRot's closed-form gradient.

* "cayley" is the paper's (arXiv 2512.24124, after SpinQuant, arXiv 2405.16406): Cayley SGD, lr 1,
  momentum 0, five fixed-point iterations. With 1000 steps on all rows it is the reference setting.
* "polar" (default): steepest descent in the spectral norm, along the polar factor of the skew gradient,
  with Nesterov momentum and a cosine step. The momentum lives in the frame that turns with R, where a skew
  matrix needs no transport.
"""

from __future__ import annotations

import math

import torch

from optrot_edge.rotations.options import OptRotOptions

MOMENTUM = {"r1": 0.8, "r2": 0.6}


def skew_gradient(r: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """½(RᵀG − GᵀR), batched: the Riemannian gradient in the frame of R."""
    product = r.mT @ gradient
    return 0.5 * (product - product.mT)


def cayley_step(r: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
    """R·Cay(−αS), S = ½(RᵀG − GᵀR), α = min(lr, 1/‖S‖₁), by five fixed-point iterations (batched)."""
    skew = skew_gradient(r, gradient)
    alpha = (1 / torch.linalg.matrix_norm(skew, ord=1, keepdim=True).clamp_min(1e-30)).clamp_max(lr)
    half = 0.5 * alpha * skew
    y = r.mT + 2 * half @ r.mT
    for _ in range(5):
        y = r.mT + half @ (r.mT + y)
    return y.mT.contiguous()


def newton_schulz_polar(a: torch.Tensor) -> torch.Tensor:
    """Rough polar factor (batched): five quintic iterations bring singular values from 0.01 of the Frobenius
    norm to within 0.7-1.2. More precision does not descend faster; exact zeros stay zero."""
    x = a / torch.linalg.matrix_norm(a, keepdim=True).clamp_min(1e-30)
    for _ in range(5):
        s = x.mT @ x
        x = 3.4445 * x + x @ (-4.7750 * s + 2.0315 * s @ s)
    return x


def polar_step(r: torch.Tensor, gradient: torch.Tensor, step: float, momentum: torch.Tensor | None = None,
               beta: float = 0.0) -> torch.Tensor:
    """Rotate R by about `step` radians against the gradient in every plane (batched).

    `momentum`, of R's shape, is updated in place: M ← βM + S, direction S + βM.
    """
    skew = skew_gradient(r, gradient)
    if momentum is not None:
        momentum.mul_(beta).add_(skew)
        skew = skew + beta * momentum
    r = r - math.tan(step) * r @ newton_schulz_polar(skew)
    for _ in range(3):  # singular values start within [1, 1.43] at the largest step; quadratic convergence
        r = 1.5 * r - 0.5 * r @ (r.mT @ r)
    return r


class Descent:
    """One (batch of) rotation(s) and what its solver remembers between steps."""

    def __init__(self, matrix: torch.Tensor, options: OptRotOptions, beta: float):
        self.matrix, self.options, self.beta = matrix, options, beta
        self.momentum = torch.zeros_like(matrix) if options.solver == "polar" else None

    def advance(self, gradient: torch.Tensor, step: int, index=slice(None)) -> None:
        """Step the rotations selected by `index` against their `gradient`."""
        size = self.options.step_size(step)
        if self.momentum is None:
            self.matrix[index] = cayley_step(self.matrix[index], gradient, size)
        else:
            momentum = self.momentum[index]
            self.matrix[index] = polar_step(self.matrix[index], gradient, size, momentum, self.beta)
            self.momentum[index] = momentum  # `index` may have made a copy
