"""OptRot: learn R1 and R2 by descent on the fourth power of the rotated weights; no data needed.

Two solvers on the same closed-form gradient:

* "cayley" is the paper's (arXiv 2512.24124, after SpinQuant, arXiv 2405.16406): Cayley SGD, lr 1,
  momentum 0, five fixed-point iterations; with `steps=1000, rows=None` it is the reference setting.
* "polar" (default) is steepest descent in the spectral norm: along the polar factor of the skew
  gradient with a cosine step, on row mini-batches drawn afresh with probability ∝ ‖row‖⁴.

Layers are streamed: one pass over the checkpoint feeds several steps, and no more than one layer and
one batch of rows are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.kernels.fourth_power import fourth_power
from optrot_edge.rotations.hadamard import random_hadamard
from optrot_edge.rotations.objective import fourth_power_batched, prepare_layer, residual_rows, value_rows
from optrot_edge.rotations.rotation import ORTHOGONALITY, Rotation, orthogonality_error, polar

BATCH_BYTES = 2**29  # rows held at once for the steps between two passes over the checkpoint


@dataclass
class OptRotOptions:
    """`rows` per step (None: all rows, one pass over the checkpoint per step); `lr` None: the solver's
    own (cayley 1.0, polar 0.1 falling to 0 along a cosine)."""

    solver: str = "polar"
    steps: int = 60
    rows: int | None = 20_000
    lr: float | None = None

    def __post_init__(self) -> None:
        if self.solver not in ("polar", "cayley"):
            raise InputError(f"unknown OptRot solver {self.solver!r}; use polar or cayley")
        if self.steps < 1 or (self.rows is not None and self.rows < 1):
            raise InputError("OptRot needs at least one step and one row per step")

    def step_size(self, step: int) -> float:
        """Step length at `step`."""
        if self.solver == "cayley":
            return 1.0 if self.lr is None else self.lr
        top = 0.1 if self.lr is None else self.lr
        return top * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def cayley_step(r: torch.Tensor, gradient: torch.Tensor, lr: float) -> torch.Tensor:
    """R·Cay(−αS), S = ½(RᵀG − GᵀR), α = min(lr, 1/‖S‖₁), by five fixed-point iterations (batched)."""
    product = r.mT @ gradient
    skew = 0.5 * (product - product.mT)
    alpha = (1 / torch.linalg.matrix_norm(skew, ord=1, keepdim=True).clamp_min(1e-30)).clamp_max(lr)
    half = 0.5 * alpha * skew
    y = r.mT + 2 * half @ r.mT
    for _ in range(5):
        y = r.mT + half @ (r.mT + y)
    return y.mT.contiguous()


def newton_schulz_polar(a: torch.Tensor) -> torch.Tensor:
    """Approximate polar factor (batched): quintic iterations that lift small singular values fast,
    then cubic ones that settle them; exact zeros stay zero."""
    x = a / torch.linalg.matrix_norm(a, keepdim=True).clamp_min(1e-30)
    for _ in range(6):
        s = x.mT @ x
        x = 3.4445 * x + x @ (-4.7750 * s + 2.0315 * s @ s)
    for _ in range(3):
        x = 1.5 * x - 0.5 * x @ (x.mT @ x)
    return x


def polar_step(r: torch.Tensor, gradient: torch.Tensor, step: float) -> torch.Tensor:
    """Rotate R by about `step` radians against the gradient in every plane (batched)."""
    product = r.mT @ gradient
    direction = newton_schulz_polar(0.5 * (product - product.mT))
    r = r - math.tan(step) * r @ direction
    for _ in range(3):  # singular values are within [1, sqrt(1 + step²)]: converges quadratically
        r = 1.5 * r - 0.5 * r @ (r.mT @ r)
    return r


def _advance(options: OptRotOptions, r: torch.Tensor, gradient: torch.Tensor, step: int) -> torch.Tensor:
    update = cayley_step if options.solver == "cayley" else polar_step
    return update(r, gradient, options.step_size(step))


def initial_rotation(config, which: set[str], generator: torch.Generator, *, r3_block=None,
                     r4_block=None) -> Rotation:
    """Random Hadamard R1 and R2 (one per layer and KV head) for the names in `which`."""
    rotation = Rotation("hadamard", r3_block=r3_block, r4_block=r4_block)
    if "r1" in which:
        rotation.r1, rotation.recipe["r1_start"] = random_hadamard(config.hidden_size, generator)
    if "r2" in which:
        drawn = [random_hadamard(config.head_dim, generator)
                 for _ in range(config.num_hidden_layers * config.num_key_value_heads)]
        shape = (config.num_hidden_layers, config.num_key_value_heads, *drawn[0][0].shape)
        rotation.r2, rotation.recipe["r2_start"] = torch.stack([m for m, _ in drawn]).view(shape), drawn[0][1]
    return rotation


class _Learner:
    """State of one OptRot run: float32 rotations on the device, and passes over the layers."""

    def __init__(self, source, start: Rotation, options: OptRotOptions, generator, device: str):
        self.source, self.config, self.options = source, source.config, options
        self.generator, self.device = generator, device
        self.r4_block = start.r4_block
        self.r1 = None if start.r1 is None else start.r1.to(device, torch.float32)
        self.r2 = None if start.r2 is None else start.r2.to(device, torch.float32)

    def layers(self):
        """(index, layer) with norms folded and R4 applied, float32 on the device."""
        for index in range(self.config.num_hidden_layers):
            layer = {k: v.to(self.device) for k, v in self.source.layer(index).items()}
            yield index, prepare_layer(layer, fold=self.r1 is not None, r4_block=self.r4_block)

    def r2_of(self, index: int):
        return None if self.r2 is None else self.r2[index]

    def losses(self) -> tuple[list[float], list[float]]:
        """Exact objective per layer, and per layer Σ‖row‖⁴ (the sampling mass)."""
        losses, mass, wide = [], [], widest_float(self.device)
        for index, layer in self.layers():
            rows = residual_rows(layer, self.r2_of(index), self.config)
            total = 0.0
            for part in rows.split(16384):
                y = part if self.r1 is None else part @ self.r1
                total += float(y.square().square().sum(dtype=wide))
            losses.append(total)
            mass.append(float(rows.square().sum(1).square().sum(dtype=wide)))
        return losses, mass

    def sample(self, rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` rows drawn ∝ ‖row‖⁴ with weights that keep the layer's loss unbiased."""
        p = rows.square().sum(1).square().cpu().double()
        if not p.sum() > 0:
            return rows[:0], p[:0].float()
        p /= p.sum()
        index = torch.multinomial(p, count, replacement=True, generator=self.generator)
        return rows[index.to(rows.device)], (1 / (count * p[index])).float()

    def descend_r2(self, layer, index: int, first: int, last: int) -> None:
        """Steps `first`..`last` of the R2 problems of one layer, all KV heads at once."""
        rows = value_rows(layer, self.r1, self.config)
        for step in range(first, last):
            _, gradient = fourth_power_batched(rows, self.r2[index])
            self.r2[index] = _advance(self.options, self.r2[index], gradient, step)

    def full_step(self, step: int) -> None:
        """One step of every rotation on all rows: a joint gradient, one pass over the checkpoint."""
        gradient = None if self.r1 is None else torch.zeros_like(self.r1)
        for index, layer in self.layers():
            if gradient is not None:
                rows = residual_rows(layer, self.r2_of(index), self.config)
                for part in rows.split(16384):
                    gradient += fourth_power(part, self.r1)[1]
            if self.r2 is not None:
                self.descend_r2(layer, index, step, step + 1)
        if gradient is not None:
            self.r1 = _advance(self.options, self.r1, gradient, step)

    def sampled_steps(self, first: int, last: int, mass: list[float]) -> None:
        """One pass: R2 steps on full rows, rows drawn for R1's steps `first`..`last`, then those steps."""
        batches: list[tuple[list, list]] = [([], []) for _ in range(first, last)]
        for index, layer in self.layers():
            if self.r2 is not None:
                self.descend_r2(layer, index, first, last)
            if self.r1 is None:
                continue
            share = max(1, round(self.options.rows * mass[index] / max(sum(mass), 1e-30)))
            rows = residual_rows(layer, self.r2_of(index), self.config)
            for xs, ws in batches:
                x, w = self.sample(rows, share)
                xs.append(x)
                ws.append(w)
        if self.r1 is not None:
            for step, (xs, ws) in enumerate(batches, first):
                weights = torch.cat(ws).to(self.device)
                _, gradient = fourth_power(torch.cat(xs), self.r1, weights)
                self.r1 = _advance(self.options, self.r1, gradient, step)


def learn(source, start: Rotation, options: OptRotOptions, generator: torch.Generator, *,
          device: str = "cpu", progress: Callable[[int, int], None] | None = None) -> Rotation:
    """OptRot from `start`; returns float64 rotations, polar-projected, with per-layer losses.

    `source` is a checkpoint reader; `progress(done, total)` is called after every pass.
    Raises RuntimeError if a projected rotation is not orthogonal to 1e-12.
    """
    learner = _Learner(source, start, options, generator, device)
    before, mass = learner.losses()
    per_pass = 1
    if options.rows is not None:
        row_bytes = 4 * options.rows * source.config.hidden_size
        per_pass = max(1, min(10, BATCH_BYTES // row_bytes))
    for first in range(0, options.steps, per_pass):
        last = min(first + per_pass, options.steps)
        if options.rows is None:
            learner.full_step(first)
        else:
            learner.sampled_steps(first, last, mass)
        if progress:
            progress(last, options.steps)
    learned = {}
    for name in ("r1", "r2"):
        matrix = getattr(learner, name)
        learned[name] = None if matrix is None else polar(matrix.cpu())
        if matrix is not None and not orthogonality_error(learned[name]) <= ORTHOGONALITY:
            raise RuntimeError(f"{name} is not orthogonal after the polar projection")
        setattr(learner, name, None if matrix is None else learned[name].to(device, torch.float32))
    after, _ = learner.losses()
    recipe = {**start.recipe, "solver": options.solver, "steps": options.steps, "rows": options.rows,
              "lr": options.lr, "loss_start": sum(before), "loss": sum(after),
              "layer_loss_start": before, "layer_loss": after}
    return Rotation("optrot", learned["r1"], learned["r2"], start.r3_block, start.r4_block, recipe)
