"""OptRot: learn R1 and R2 by descent on the fourth power of the rotated weights; no data needed (arXiv 2512.24124).

`solvers.py` has the steps, the paper's and the fast one, `learner.py` what a run does between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from optrot_edge.rotations.hadamard import random_hadamard
from optrot_edge.rotations.learner import Learner
from optrot_edge.rotations.objective import MATRICES
from optrot_edge.rotations.options import OptRotOptions
from optrot_edge.rotations.rotation import Rotation
from optrot_edge.rotations.solvers import cayley_step, polar_step

__all__ = ["OptRotOptions", "cayley_step", "initial_rotation", "learn", "polar_step"]

TOP = 50  # matrices of the paper's reduced objective


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


def learn(source, start: Rotation, options: OptRotOptions, generator: torch.Generator, *,
          device: str = "cpu", progress: Callable[[int, int], None] | None = None) -> Rotation:
    """OptRot from `start`; returns float64 rotations, polar-projected, with losses per layer.

    `source` is a checkpoint reader: `.config` and `.layer(index, dtype)`. The objective "top-50" keeps the 50 matrices
    of largest loss at `start` for the whole run. `progress(done, total)` is called after every pass.
    Under torchrun every process must call this with the same arguments; all return the same rotation. Its
    recipe holds the total and per-layer losses of all matrices before and after (exact), the objective's
    (`objective_loss`), and `loss_curve`: the loss before each step, estimated from the rows it took (of v and o
    alone when R2 is learned alone).
    Raises RuntimeError if a projected rotation is not orthogonal to 1e-12.
    """
    learner = Learner(source, start, options, generator, device)
    before = learner.losses()
    counted = torch.ones_like(before)
    if options.objective == "top-50":
        learner.choose(before, TOP)
        counted = torch.tensor([[float(name in learner.chosen[index]) for name in MATRICES]
                                for index in range(len(before))], dtype=before.dtype)
    curve = []
    for done, losses in learner.passes():
        curve += losses
        if progress:
            progress(done, options.steps)
    learned = learner.finish()
    after = learner.losses()
    recipe = {**start.recipe, "solver": options.solver, "objective": options.objective, "steps": options.steps,
              "steps_taken": len(curve), "rows": options.rows_per_step(source.config.hidden_size),
              "lr": options.lr, "tolerance": options.tolerance, "target": options.target,
              "processes": learner.world.size,
              "loss_start": float(before.sum()), "loss": float(after.sum()),
              "objective_loss_start": float((before * counted).sum()),
              "objective_loss": float((after * counted).sum()),
              "layer_loss_start": before.sum(1).tolist(), "layer_loss": after.sum(1).tolist(),
              "loss_curve": curve}
    return Rotation("optrot", learned["r1"], learned["r2"], start.r3_block, start.r4_block, recipe)
