"""What every matrix costs in every type: KL in nats per token, from one calibration pass.

For a small error Δ in one matrix, KL = ½ Σ_i g_i (ΔHΔᵀ)_ii with g the sensitivity of its rows
(`optrot_edge.rotations.sensitivity`). GPTQ turns ΔHΔᵀ into Σ_j D_j η_ij² (method of OptRot+), η the rounding error on
the fitted grid, which rounding to nearest has as well: no type has to be solved for. Rows are drawn with probability
∝ g. Embedding and head follow from the same Fisher information: an error in a row of the embedding meets the gradient
at the tokens that read it, one in a row of the head is weighted by p (1 − p) of its token.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from optrot_edge.models import forward
from optrot_edge.quantize.gptq import prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.refit import row_losses
from optrot_edge.rotations.covariance import INPUTS, rotate_covariances
from optrot_edge.rotations.rotation import Rotation
from optrot_edge.rotations.sensitivity import load_layer

ROWS = 128  # of a matrix that are fitted in every type
HEAD_ROWS = 2048
HEAD_TOKENS = 512
VERSION = 2  # of what is kept: raise it when the same inputs give other costs


def measure_costs(source, inputs, *, progress: Callable[[int, int], None] | None = None) -> dict[str, dict[str, float]]:
    """By canonical name (`lm_head.weight` for a tied head too) and type: KL in nats per token.

    `source` is an open model, `inputs` its CalibrationInputs. Holds one layer, or the vocabulary's matrix.
    """
    generator = torch.Generator().manual_seed(inputs.recipe.seed)
    costs = {"embed_tokens.weight": _embedding_costs(source, inputs), "lm_head.weight": _head_costs(source, inputs)}
    for index, sensitivity in enumerate(inputs.sensitivity):
        layer = load_layer(source, index, inputs.device)
        stored = rotate_covariances(inputs.covariances.layer(index, inputs.device), Rotation("none"), index, layer,
                                    source.config)
        for kind, names in INPUTS.items():
            drawn = {name: _draw(sensitivity[name], ROWS, generator).to(inputs.device) for name in names}
            found = _linear_costs({name: layer[f"{name}.weight"][rows] for name, rows in drawn.items()},
                                  stored[kind], inputs.recipe)
            for name in names:
                total = float(sensitivity[name].sum())
                costs[f"layers.{index}.{name}.weight"] = {
                    type_: 0.5 * total * mean for type_, mean in found[name].items()}
        if progress:
            progress(index + 1, source.config.num_hidden_layers)
    return costs


def _draw(weights: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` indices (all, once each, where there are no more), with probability ∝ weights, systematically."""
    weights = weights.double().cpu()
    total = float(weights.sum())
    if total <= 0:
        return torch.arange(min(count, len(weights)))
    shift = torch.rand(1, generator=generator, dtype=torch.float64)
    points = (torch.arange(count, dtype=torch.float64) + shift) / count
    return torch.searchsorted(weights.cumsum(0) / total, points).clamp_max(len(weights) - 1)


def _linear_costs(weights: dict[str, torch.Tensor], h: torch.Tensor, recipe) -> dict[str, dict[str, float]]:
    """By name and type: the mean over the drawn rows of Σ_j D_j η_ij²."""
    cost = prepare_hessian(h, damp=recipe.damp).column_cost.to(h.device, torch.float32)
    stacked = torch.cat(list(weights.values()))
    sizes = [len(weight) for weight in weights.values()]
    out: dict[str, dict[str, float]] = {name: {} for name in weights}
    for kind in recipe.candidates(stacked.shape[1]):
        losses = (_error(stacked, kind, h.diagonal()).square() @ cost).split(sizes)
        for name, loss in zip(weights, losses, strict=True):
            out[name][kind] = float(loss.mean())
    return out


def _error(weight: torch.Tensor, kind: str, importance=None) -> torch.Tensor:
    """What rounding to nearest leaves."""
    grid = Grid(kind)
    params = grid.fit(weight, importance)
    return grid.decode(grid.round(weight, params), params) - weight


def _embedding_costs(source, inputs) -> dict[str, float]:
    """½ of the mean square of Σ g·Δ, over the tokens of each window that read a row."""
    tokens, gradient = inputs.gradient
    seen, place = tokens.unique(return_inverse=True)
    rows = source.embedding(torch.float32)[seen]
    power = torch.zeros_like(rows, dtype=torch.float64)
    for where, grad in zip(place, gradient, strict=True):
        power += torch.zeros_like(power).index_add_(0, where, grad.double()).square()
    return {kind: 0.5 * float((_error(rows, kind).double().square() * power).sum()) / tokens.numel()
            for kind in inputs.recipe.candidates(rows.shape[1])}


@torch.no_grad()
def _head_costs(source, inputs) -> dict[str, float]:
    """½ E[Σ_i p_i (1 − p_i) (Δ_i x)²] of rounding, over the rows of most weight and scaled to all of it, times what
    GPTQ leaves of it: Σ D η² of ηHηᵀ."""
    tokens, _ = inputs.gradient
    hidden = forward.final_hidden(source, tokens, device=inputs.device).flatten(0, 1)
    h = (hidden.T @ hidden).double() / len(hidden)
    cost = prepare_hessian(h, damp=inputs.recipe.damp).column_cost.to(hidden)
    head = source.lm_head(torch.float32)
    head = source.embedding(torch.float32) if head is None else head
    judged, spread = hidden[:HEAD_TOKENS], []
    for part in judged.split(128):
        p = F.linear(part, head).softmax(-1)
        spread.append(p * (1 - p))
    mass = sum(part.sum(0, dtype=torch.float64) for part in spread)
    rows = mass.topk(min(HEAD_ROWS, len(mass))).indices
    weight, share = torch.cat([part[:, rows] for part in spread]), float(mass[rows].sum() / mass.sum())
    out = {}
    for kind in inputs.recipe.candidates(head.shape[1]):
        error = _error(head[rows], kind, h.diagonal())
        rounding = 0.5 * float((weight * F.linear(judged, error).square()).sum(dtype=torch.float64)) / len(judged)
        before, after = row_losses(error, h.float()), error.square() @ cost
        out[kind] = rounding / share * min(1.0, float((mass[rows] @ after.double()) / (mass[rows] @ before.double())))
    return out


def kept_costs(key: dict, make: Callable[[], dict]) -> dict:
    """The costs kept for `key` (all that decides them) in the user's cache, or those of `make`, kept from now on."""
    digest = hashlib.sha256(json.dumps(key | {"version": VERSION}, sort_keys=True).encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optrot-edge" / "costs"
    path = base / f"{digest[:32]}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        costs = make()
    try:
        base.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=base, suffix=".partial", delete=False) as handle:
            json.dump(costs, handle)
        os.replace(handle.name, path)
    except OSError:
        pass  # a cache that cannot be written costs time, not results
    return costs
