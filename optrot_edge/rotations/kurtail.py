"""KurTail (arXiv 2503.01483): rotations that bring the kurtosis of activations to that of a uniform distribution.

Loss: the mean over tokens of |κ − 1.8|, κ = E[(z−μ)⁴] / E[(z−μ)²]² over a token's entries, because a token is what is
rounded together. R1 sees what all attention and MLP blocks read, pooled, norms without their gains (which are folded);
each R2 sees the value vectors of its layer and KV head. Nothing is quantised, and no gradient passes through layers.

Chosen where the paper leaves it open or other machinery was there: the two inputs and the values of each layer for
4,096 tokens, drawn once from the calibration windows, of which every step sees 1,024; the polar solver with its
momentum and cosine (the paper uses Cayley Adam). 585 tokens besides, an eighth of all, only judge; where the loss does
not fall there the start is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward
from optrot_edge.quantize.streams import embedded, native_chunks, picked_rows
from optrot_edge.rotations.fuse import fold_norms
from optrot_edge.rotations.options import OptRotOptions
from optrot_edge.rotations.rotation import Rotation, projected
from optrot_edge.rotations.sampling import batches
from optrot_edge.rotations.solvers import MOMENTUM, Descent

UNIFORM = 1.8
TOKENS, STEP_TOKENS = 4681, 1024  # drawn once, and seen by a step: the same at every step would be learned by heart
HELD_OUT = 8  # one token in so many only judges


def kurtosis_loss(z: torch.Tensor) -> torch.Tensor:
    """Mean of |κ − 1.8| over rows of `z` [..., rows, n], one per leading index; rows of one repeated value count 0."""
    square = (z - z.mean(-1, keepdim=True)).square()
    second = square.mean(-1)
    kurtosis = square.square().mean(-1) / second.square().clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(second > 0, (kurtosis - UNIFORM).abs(), 0.0).mean(-1)


@torch.no_grad()
def sample_inputs(source, tokens: torch.Tensor, count: int, generator: torch.Generator, *,
                  device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Of `count` tokens drawn from `tokens` [windows, length]: what attention and MLP of every layer read, without the
    norms' gains [count, 2 · layers, hidden], and their values [layers, kv_heads, count, head_dim], float32."""
    config = source.config
    kept = torch.randperm(tokens.numel(), generator=generator)[:count].sort().values
    reads = torch.empty(len(kept), 2 * config.num_hidden_layers, config.hidden_size)
    values = torch.empty(config.num_hidden_layers, config.num_key_value_heads, len(kept), config.head_dim)
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    stream = embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids))
    for index in range(config.num_hidden_layers):
        layer = fold_norms({k: v.to(device) for k, v in source.layer(index, torch.float32).items()})
        for windows in stream.batches(8):
            first, last = windows.start * tokens.shape[1], windows.stop * tokens.shape[1]
            here = ((kept >= first) & (kept < last)).nonzero()[:, 0]
            rows = (kept[here] - first).to(device)

            def tap(name, x, y, here=here, rows=rows, index=index):
                if name in ("q_proj", "gate_proj"):
                    reads[here, 2 * index + (name == "gate_proj")] = x.flatten(0, 1)[rows].cpu()
                elif name == "v_proj":
                    heads = y.flatten(0, 1)[rows].view(len(rows), config.num_key_value_heads, -1)
                    values[index][:, here] = heads.transpose(0, 1).cpu()
                return y

            x = stream.read(windows).to(device)
            stream.write(windows, forward.decoder_layer(x, {**layer, "tap": tap}, config, rope).cpu())
    stream.close()
    return reads, values


class _Problem:
    """Rows [..., tokens, n], or [tokens, k, n] for one matrix, under a (batch of) rotation(s) [..., n, n]."""

    def __init__(self, start: torch.Tensor, rows: torch.Tensor, held_out: torch.Tensor, axis: int,
                 options: OptRotOptions, beta: float):
        self.rows, self.held_out, self.axis = rows, held_out, axis
        self.descent = Descent(start.to(rows), options, beta)

    def step(self, step: int, tokens: torch.Tensor) -> float:
        """One step on some `tokens`; the mean loss before it."""
        rows = self.rows.index_select(self.axis, tokens)
        r = self.descent.matrix.detach().requires_grad_()
        with torch.enable_grad():
            losses = self._losses(rows, r)
            losses.sum().backward()
        self.descent.advance(r.grad, step)
        return float(losses.detach().mean())

    def judged(self, matrix: torch.Tensor) -> float:
        return float(self._losses(self.held_out, matrix.to(self.held_out)).mean())

    @staticmethod
    def _losses(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return kurtosis_loss((rows.flatten(0, 1) if matrix.ndim == 2 else rows) @ matrix)


@torch.no_grad()
def learn_kurtail(source, start: Rotation, tokens: torch.Tensor, steps: int, generator: torch.Generator, *,
                  device: str = "cpu", progress: Callable[[int, int, float], None] | None = None) -> Rotation:
    """R1 and R2, as far as `start` has them, by `steps` steps on `tokens` [windows, length].

    `progress(step, steps, loss)`, the loss that of R1 and the mean of R2's together. The recipe holds it for every step
    (`loss_curve`) and, of tokens that only judge, before and after (`loss_start`, `loss`), and whether what was learned
    was `kept`. Raises InputError with fewer than 16 tokens and for a model that overflows.
    """
    if tokens.numel() < 2 * HELD_OUT:
        raise InputError(f"--rotation kurtail needs at least {2 * HELD_OUT} calibration tokens; raise --nsamples")
    reads, values = sample_inputs(source, tokens, TOKENS, generator, device=device)
    if not (reads.isfinite().all() and values.isfinite().all()):
        raise InputError("activations of the float model are not finite; the model overflows or is damaged")
    options = OptRotOptions("polar", steps)
    judges = len(reads) // HELD_OUT  # the first of the text
    trained = len(reads) - judges
    problems = {}
    for name, inputs, axis in (("r1", reads, 0), ("r2", values, 2)):
        if getattr(start, name) is not None:
            held_out, rows = (part.to(device) for part in inputs.split([judges, trained], axis))
            problems[name] = _Problem(getattr(start, name), rows, held_out, axis, options, MOMENTUM[name])
    before, curve = {name: problem.judged(getattr(start, name)) for name, problem in problems.items()}, []
    drawn = batches(trained, STEP_TOKENS, generator)
    for step in range(steps):
        seen = next(drawn).to(device)
        curve.append(sum(problem.step(step, seen) for problem in problems.values()))
        if progress:
            progress(step + 1, steps, curve[-1])
    learned = {name: projected(problem.descent.matrix) for name, problem in problems.items()}
    after = {name: problem.judged(learned[name]) for name, problem in problems.items()}
    kept = math.fsum(after.values()) < math.fsum(before.values())
    r1, r2 = ((learned.get(name) if kept else getattr(start, name)) for name in ("r1", "r2"))
    recipe = {**start.recipe, "solver": "polar", "steps": steps, "calibration_tokens": tokens.numel(),
              "sampled_tokens": trained, "tokens": min(STEP_TOKENS, trained), "kept": kept,
              "loss_start": sum(before.values()), "loss": sum(after.values()), "loss_curve": curve}
    return Rotation("kurtail", r1, r2, start.r3_block, start.r4_block, recipe)
