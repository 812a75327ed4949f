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
    """`cayley` along the skew gradient S = ½(RᵀG − GᵀR)."""
    return cayley(r, skew_gradient(r, gradient), lr)


def cayley(r: torch.Tensor, skew: torch.Tensor, lr: float) -> torch.Tensor:
    """R·Cay(−αS), α = min(lr, 1/‖S‖₁), by five fixed-point iterations (batched)."""
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
    return nearly_orthogonal(r - math.tan(step) * r @ newton_schulz_polar(skew))


def nearly_orthogonal(r: torch.Tensor) -> torch.Tensor:
    """Three steps of Newton and Schulz towards the polar factor (batched): they converge quadratically, from singular
    values up to 1.43, which is what the largest polar step leaves."""
    for _ in range(3):
        r = 1.5 * r - 0.5 * r @ (r.mT @ r)
    return r


class RiemannAdam:
    """Adam (arXiv 1412.6980) on a batch of rotations, its moments those of the skew gradient in the frame that turns
    with R, and a Cayley step along the result, a skew matrix too because its squares are symmetric.

    One step turns by about `lr` radians: entries of ±1 have a spectral norm of about √n, which the step is divided by.
    """

    BETAS, EPSILON = (0.9, 0.99), 1e-20

    def __init__(self, like: torch.Tensor):
        self.mean, self.square, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def step(self, r: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
        """R after one step against `gradient`."""
        skew, self.steps = skew_gradient(r, gradient), self.steps + 1
        self.mean.lerp_(skew, 1 - self.BETAS[0])
        self.square.lerp_(skew.square(), 1 - self.BETAS[1])
        size = (self.square / (1 - self.BETAS[1]**self.steps)).sqrt_().add_(self.EPSILON)
        direction = self.mean / (1 - self.BETAS[0]**self.steps) / size
        return nearly_orthogonal(cayley(r, direction, lr / math.sqrt(r.shape[-1])))


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
