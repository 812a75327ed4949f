"""OptRot+: learn R1, R2 and the channel scales that every format stores anyway, on the stored grid's loss.

Start: the native model (R1 = I, R2 = I, s = γ) or a random Hadamard. Each step takes a few layers, drawn
afresh in every round, and moves R1 and their R2 along the polar factor of the skew gradient and their log
scales by Adam (arXiv 1412.6980). The input covariances are collected once and transformed, see
`layer_loss`. Method: OptRot+ (arXiv 2512.24124) with the block grid and the norm gains made part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from optrot_edge.checkpoint import GridSpec, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.gridspec import fitting_type
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.rotations.covariance import Covariances, both_sides
from optrot_edge.rotations.fuse import READS
from optrot_edge.rotations.grid_loss import column_cost
from optrot_edge.rotations.layer_loss import LayerProblem, LayerVariables, LossForm
from optrot_edge.rotations.rotation import Rotation, projected, scale_widths
from optrot_edge.rotations.solvers import MOMENTUM, polar_step

CACHE_BYTES = 2**31  # decoder weights (twice: as read and folded) kept in memory up to this size
SMALLEST_GAIN = 1e-3  # of the mean: a dead channel's gain starts there, as its logarithm must exist


@dataclass
class OptRotPlusOptions:
    """`objective`: "grid" or "plain"; `steps`: each visits every layer; `rows`: of q/k and of gate/up drawn per visit
    (None: all); `scales`: learn channel scales too;
    `r1_step`: largest step of R1 in radians (None: 0.02 from the native model, 0.1 from a Hadamard)."""

    objective: str = "grid"
    steps: int = 30
    rows: int | None = 512
    scales: bool = True
    damp: float = 0.1
    r1_step: float | None = None
    r2_step: float = 0.05
    scale_step: float = 0.05

    def __post_init__(self) -> None:
        if self.objective not in ("grid", "plain"):
            raise InputError(f"unknown OptRot+ objective {self.objective!r}; use grid or plain")
        if min(self.steps, 1 if self.rows is None else self.rows) < 1:
            raise InputError("OptRot+ needs at least one step and one row")


class PlusLearner:
    """State of one OptRot+ run; see `learn_plus`."""

    def __init__(self, source, start: Rotation, grid: GridSpec, covariances: Covariances,
                 sensitivity: list[dict], options: OptRotPlusOptions, generator, device: str):
        self.source, self.config, self.options = source, source.config, options
        self.covariances, self.sensitivity = covariances, sensitivity
        self.generator, self.device, self.r4_block = generator, device, start.r4_block
        self.form = LossForm(grid.group_size, grid.is_affine, options.damp, options.objective)
        on_device = lambda t: None if t is None else t.to(device, torch.float32)  # noqa: E731
        self.r1, self.r2 = on_device(start.r1), on_device(start.r2)
        self.native = start.r1 is None or torch.equal(start.r1, torch.eye(len(start.r1), dtype=torch.float64))
        self.log_scales = self._start_scales(start)
        self.momentum = {name: torch.zeros_like(value) for name, value in (("r1", self.r1), ("r2", self.r2))
                         if value is not None}
        weights = sum(p.numel() for p in source.layer(0).values())
        self.keeps = 8 * weights * self.config.num_hidden_layers <= CACHE_BYTES
        self.kept: dict[int, LayerProblem] = {}
        self.adam = None
        if self.log_scales:
            self.adam = torch.optim.Adam(self.log_scales.values(), lr=options.scale_step, betas=(0.9, 0.99), eps=1e-30)
        self.down_cost = [self._down_cost(index) for index in range(self.config.num_hidden_layers)]

    def _start_scales(self, start: Rotation) -> dict[str, torch.Tensor]:
        names = scale_widths(self.config) if self.options.scales else ()
        if self.r4_block:  # behind R4 a scale no longer belongs to one column of down
            names = [name for name in names if name != "up"]
        found = start_log_scales(self.source, start, names, native=self.native)
        return {name: value.to(self.device, torch.float32) for name, value in found.items()}

    def _down_cost(self, index: int) -> torch.Tensor:
        """C of what down_proj reads. Only its scales change it, nearly by their squares (exactly without damping)."""
        h = self.covariances.layer(index, self.device)["down"]
        if self.r4_block:
            h = both_sides(h, lambda h: block_hadamard(h, self.r4_block))
        return column_cost(h, self.options.damp).cost.float()

    def problem(self, index: int) -> LayerProblem:
        """Layer `index` with its covariances, float32 on the device; kept while all fit CACHE_BYTES."""
        if index not in self.kept:
            problem = self._read(index)
            if not self.keeps:
                return problem
            self.kept[index] = problem
        return self.kept[index]

    def _read(self, index: int) -> LayerProblem:
        layer = {k: v.to(self.device) for k, v in self.source.layer(index, torch.float32).items()}
        stored = self.covariances.layer(index, self.device, torch.float32)
        sensitivity = {k: v.to(self.device, torch.float32) for k, v in self.sensitivity[index].items()}
        return LayerProblem(layer, stored, self.down_cost[index], sensitivity, self.config, self.form,
                            self.r4_block)

    def variables(self, index: int) -> LayerVariables:
        """The current point, of one layer."""
        return LayerVariables(self.r1, None if self.r2 is None else self.r2[index],
                              {name: value[index] for name, value in self.log_scales.items()})

    def losses(self) -> list[dict[str, float]]:
        """The loss at the current point, per layer and kind of input."""
        return [self.problem(i).evaluate(self.variables(i)).losses for i in range(self.config.num_hidden_layers)]

    def step(self, progress: float) -> float:
        """One step on every layer; `progress` in [0, 1) shortens it along a cosine. Returns the loss."""
        shrink = 0.5 * (1 + math.cos(math.pi * progress))
        total, gradient = 0.0, None if self.r1 is None else torch.zeros_like(self.r1)
        slopes = {name: torch.zeros_like(value) for name, value in self.log_scales.items()}
        for index in range(self.config.num_hidden_layers):
            at = self.variables(index)
            found = self.problem(index).evaluate(at, self.options.rows, self.generator)
            total += sum(found.losses.values())
            if gradient is not None:
                gradient += found.r1
            if self.r2 is not None:
                self.r2[index] = polar_step(self.r2[index], found.r2, self.options.r2_step * shrink,
                                            self.momentum["r2"][index], MOMENTUM["r2"])
            for name, value in found.log_scales.items():
                slopes[name][index] = value
        if gradient is not None:
            top = self.options.r1_step or (0.02 if self.native else 0.1)
            self.r1 = polar_step(self.r1, gradient, top * shrink, self.momentum["r1"], MOMENTUM["r1"])
        if self.adam is not None:
            for name, value in self.log_scales.items():
                value.grad = slopes[name]
            self.adam.param_groups[0]["lr"] = self.options.scale_step * shrink
            self.adam.step()
        return total

    def run(self, progress: Callable[[int, int, float], None] | None) -> list[float]:
        """All steps; returns the estimated loss before each."""
        losses = []
        for step in range(self.options.steps):
            losses.append(self.step(step / self.options.steps))
            if progress:
                progress(step + 1, self.options.steps, losses[-1])
        return losses

    def result(self, start: Rotation, recipe: dict) -> Rotation:
        """The learned rotation: float64, R1 and R2 projected, scales exponentiated."""
        r1, r2 = (None if matrix is None else projected(matrix) for matrix in (self.r1, self.r2))
        scales = {name: value.cpu().double().exp() for name, value in self.log_scales.items()}
        return Rotation("optrot+", r1, r2, start.r3_block, start.r4_block, recipe, scales)


def start_log_scales(source, start: Rotation, names, *, native: bool) -> dict[str, torch.Tensor]:
    """Logarithms of the channel scales `names` [layers, n] to begin with: the start's own, else, for norms and if
    `native`, the model's gains, else zero."""
    widths, layers = scale_widths(source.config), source.config.num_hidden_layers
    out = {name: start.scales[name].log() if name in start.scales else torch.zeros(layers, widths[name])
           for name in names}
    gains = [name for name in names if name in READS and native and name not in start.scales]
    for index in range(layers if gains else 0):
        layer = source.layer(index)
        for name in gains:
            gain = layer[f"{name}.weight"].float().abs()
            out[name][index] = gain.clamp_min(SMALLEST_GAIN * gain.mean()).log()
    return out


def native_start(config, which: set[str], *, r3_block=None, r4_block=None) -> Rotation:
    """R1 = I and R2 = I for the names in `which`."""
    rotation = Rotation("optrot+", r3_block=r3_block, r4_block=r4_block, recipe={"start": "native"})
    if "r1" in which:
        rotation.r1 = torch.eye(config.hidden_size, dtype=torch.float64)
    if "r2" in which:
        eye = torch.eye(config.head_dim, dtype=torch.float64)
        rotation.r2 = eye.repeat(config.num_hidden_layers, config.num_key_value_heads, 1, 1)
    return rotation


@torch.no_grad()
def learn_plus(source, start: Rotation, grid: GridSpec | str, covariances: Covariances, sensitivity: list[dict],
               options: OptRotPlusOptions, generator: torch.Generator, *, device: str = "cpu",
               progress: Callable[[int, int, float], None] | None = None) -> Rotation:
    """OptRot+ from `start` for a body stored on `grid`; `sensitivity` as `output_sensitivity` returns it.

    Raises InputError when rows do not divide into the grid's groups and RuntimeError if a
    projected rotation is not orthogonal to 1e-12.
    """
    grid = grid_spec(grid) if isinstance(grid, str) else grid
    if grid.subscales:  # where rows do not fill super-blocks, the grid that the residual stream's readers get
        grid = grid_spec(fitting_type(grid.name, source.config.hidden_size))
    for width in (source.config.hidden_size, source.config.intermediate_size):
        if width % grid.group_size:
            raise InputError(f"rows of {width} weights do not divide into groups of {grid.group_size}")
    learner = PlusLearner(source, start, grid, covariances, sensitivity, options, generator, device)
    before = learner.losses()
    curve = learner.run(progress)
    recipe = {**start.recipe, "grid": grid.name, "objective": options.objective, "steps": options.steps,
              "rows": options.rows, "scales": options.scales, "damp": options.damp,
              "calibration_tokens": covariances.tokens, "loss_curve": curve}
    rotation = learner.result(start, recipe)
    learner.r1 = None if rotation.r1 is None else rotation.r1.to(learner.device, torch.float32)
    learner.r2 = None if rotation.r2 is None else rotation.r2.to(learner.device, torch.float32)
    after = learner.losses()
    total = lambda rows: sum(sum(row.values()) for row in rows)  # noqa: E731
    rotation.recipe |= {"loss_start": total(before), "loss": total(after),
                        "layer_loss_start": [sum(r.values()) for r in before],
                        "layer_loss": [sum(r.values()) for r in after],
                        "kind_loss_ratio": {k: sum(r[k] for r in after) / max(sum(r[k] for r in before), 1e-30)
                                            for k in before[0]}}
    return rotation
