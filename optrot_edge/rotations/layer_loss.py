"""OptRot+'s loss of one decoder layer as a function of R1, R2 and the channel scales, with gradients.

Weights and covariances are the unrotated float model's; what a rotation does to them is computed here, so
nothing is collected twice. Notation as in `fuse`: readers `W diag(γ) R1 diag(1/s)` see inputs of
covariance `diag(s) R1ᵀ H R1 diag(s)`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from optrot_edge.device import widest_float
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import Layer
from optrot_edge.rotations.fuse import READS
from optrot_edge.rotations.grid_loss import ColumnCost, block_loss, column_cost, plain_loss

NORM_INPUT = {"attn_norm": "attn", "mlp_norm": "mlp"}


@dataclass(frozen=True)
class LossForm:
    """What a matrix costs: `objective` "grid" (steps of a block grid) or "plain" (tr D · ‖W‖₄²)."""

    group_size: int
    affine: bool
    damp: float
    objective: str = "grid"

    def __call__(self, weight, row_weights, cost):
        """Loss and its gradients with respect to `weight`, `cost` and `row_weights`."""
        if self.objective == "plain":
            return plain_loss(weight, row_weights, cost)
        return block_loss(weight, row_weights, cost, self.group_size, affine=self.affine)


@dataclass
class LayerVariables:
    """The unknowns of one layer, float32: `r1` [d, d] or None, `r2` [kv, hd, hd] or None, and `log_scales`
    by name (see Rotation.scales; a norm that is missing keeps its gain, or 1 when R1 folds it)."""

    r1: torch.Tensor | None
    r2: torch.Tensor | None
    log_scales: dict[str, torch.Tensor]


@dataclass
class LayerGradient:
    """Loss by kind of matrix, and gradients with respect to the fields of LayerVariables."""

    losses: dict[str, float] = field(default_factory=dict)
    r1: torch.Tensor | None = None
    r2: torch.Tensor | None = None
    log_scales: dict[str, torch.Tensor] = field(default_factory=lambda: defaultdict(float))


def rotated_weights(weights: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Weights of the rows of `RᵀW` from those of W's (batched): `Σ_j R_ji² g_j`, as if gradients were independent."""
    return weights if rotation is None else (rotation.square() * weights[..., None]).sum(-2)


class LayerProblem:
    """One layer's weights, covariances {"attn", "o", "mlp"}, C of down's input, and row weights."""

    def __init__(self, layer: Layer, covariances: dict, down_cost: torch.Tensor, sensitivity: dict,
                 config: ModelConfig, form: LossForm, r4_block: int | None = None):
        self.layer, self.covariances, self.form, self.config = layer, covariances, form, config
        self.down_cost, self.sensitivity = down_cost, sensitivity
        self.down = layer["down_proj.weight"]
        if r4_block:
            self.down = block_hadamard(self.down, r4_block)
        self.rows = {norm: self._fold(norm) for norm in READS}
        self.values = layer["v_proj.weight"] * layer["attn_norm.weight"]

    def evaluate(self, at: LayerVariables, rows: int | None = None,
                 generator: torch.Generator | None = None) -> LayerGradient:
        """Loss and gradients at `at`; with `rows`, q/k, gate/up and down's blocks are sampled.

        That many rows of q/k and of gate/up stand for all, drawn by their share of the loss, and as many
        columns of down, in whole blocks.
        """
        out = LayerGradient()
        out.r1 = None if at.r1 is None else torch.zeros_like(at.r1)
        out.r2 = None if at.r2 is None else torch.zeros_like(at.r2)
        for norm in READS:
            self._readers(norm, at, out, rows, generator)
        self._attention_output(at, out)
        self._down(at, out, rows, generator)
        return out

    def _fold(self, norm: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Folded rows [n, hidden] of the norm's readers without v, their weights [n], and odds to be drawn."""
        names = [name for name in READS[norm] if name != "v_proj"]
        x = torch.cat([self.layer[f"{name}.weight"] for name in names]) * self.layer[f"{norm}.weight"]
        weights = torch.cat([self.sensitivity[name] for name in names])
        odds = (weights * x.square().sum(1)).double().cpu().clamp_min(1e-300)
        return x, weights, odds / odds.sum()

    def column_costs(self, norm: str, at: LayerVariables) -> tuple[ColumnCost, torch.Tensor]:
        """D of the rotated, scaled input of `norm`'s readers, and that input's covariance."""
        h = self.covariances[NORM_INPUT[norm]]
        if at.r1 is not None:
            h = at.r1.T @ h @ at.r1
        s = self._gain(norm, at)
        h = s[:, None] * h * s
        return column_cost(h.to(widest_float(h.device)), self.form.damp), h

    def _gain(self, norm: str, at: LayerVariables) -> torch.Tensor:
        """The norm's gain after the change."""
        gain = self.layer[f"{norm}.weight"]
        if norm in at.log_scales:
            return at.log_scales[norm].exp()
        return gain if at.r1 is None else torch.ones_like(gain)

    def _readers(self, norm, at, out, rows, generator) -> None:
        x, weights = self._reader_rows(norm, at, rows, generator)
        gain = self._gain(norm, at)
        y = (x if at.r1 is None else x @ at.r1) / gain
        costs, h = self.column_costs(norm, at)
        loss, dy, along, per_row = self.form(y, weights, costs.cost.to(y))
        out.losses[NORM_INPUT[norm]] = float(loss)
        dh = costs.gradient(along).to(y)
        if norm in at.log_scales:
            out.log_scales[norm] += 2 * (dh * h).sum(1) - (dy * y).sum(0)
        dy = dy / gain
        if at.r1 is not None:
            out.r1 += x.T @ dy
            scaled = gain[:, None] * dh * gain
            out.r1 += 2 * self.covariances[NORM_INPUT[norm]] @ (at.r1 @ scaled)
            dy = dy @ at.r1.T if norm == "attn_norm" and at.r2 is not None else dy
        if norm == "attn_norm" and at.r2 is not None:
            kv, dim = self.config.num_key_value_heads, self.config.head_dim
            out.r2 += self.values.view(kv, dim, -1) @ dy[-kv * dim:].view(kv, dim, -1).mT
            importance = self.sensitivity["v_proj"].view(kv, dim, 1)
            out.r2 += 2 * importance * at.r2 * per_row[-kv * dim:].view(kv, 1, dim)

    def _reader_rows(self, norm, at, rows, generator):
        """Folded rows [n, hidden] that R1 multiplies and their weights [n]; v's come last, all of them."""
        x, weights, odds = self.rows[norm]
        if rows is not None and rows < len(x):
            index = torch.multinomial(odds, rows, replacement=True, generator=generator)
            share = (1 / (rows * odds[index])).to(weights)
            index = index.to(x.device)
            x, weights = x[index], weights[index] * share
        if norm == "attn_norm":
            kv, dim = self.config.num_key_value_heads, self.config.head_dim
            values = self.values
            if at.r2 is not None:
                values = (at.r2.mT @ values.view(kv, dim, -1)).flatten(0, 1)
            importance = rotated_weights(self.sensitivity["v_proj"].view(kv, dim), at.r2).flatten()
            x, weights = torch.cat([x, values]), torch.cat([weights, importance])
        return x, weights

    def _writer(self, name: str, y: torch.Tensor, cost: torch.Tensor, at: LayerVariables, out: LayerGradient):
        """Loss of o or down and its gradients by `y` and `cost`; what it owes to R1 by its row weights, into `out`."""
        weights = self.sensitivity[name]
        loss, dy, along, per_row = self.form(y, rotated_weights(weights, at.r1), cost)
        if at.r1 is not None:
            out.r1 += 2 * weights[:, None] * at.r1 * per_row
        return loss, dy, along

    def _attention_output(self, at: LayerVariables, out: LayerGradient) -> None:
        weight, h = self.layer["o_proj.weight"], self.covariances["o"]
        heads, dim, groups = self.config.num_attention_heads, self.config.head_dim, self.config.query_groups
        columns = weight.view(-1, heads, dim).transpose(0, 1)  # [heads, d, dim]
        turn = None if at.r2 is None else at.r2.repeat_interleave(groups, dim=0)
        if turn is not None:
            columns = columns @ turn
            h = turn.mT @ h.view(heads, dim, -1)
            h = (h.flatten(0, 1).T.reshape(heads, dim, -1).mT @ turn).transpose(0, 1).reshape(heads * dim, -1)
        z = columns.transpose(0, 1).flatten(1)
        y = z if at.r1 is None else at.r1.T @ z
        scale = torch.ones(heads * dim).to(y)
        if "value" in at.log_scales:
            per_head = at.log_scales["value"].exp().view(-1, dim)
            scale = per_head.repeat_interleave(groups, dim=0).flatten()
            y, h = y / scale, scale[:, None] * h * scale
        costs = column_cost(h.to(widest_float(h.device)), self.form.damp)
        loss, dy, along = self._writer("o_proj", y, costs.cost.to(y), at, out)
        out.losses["o"] = float(loss)
        dh = costs.gradient(along).to(y)
        if "value" in at.log_scales:
            both = 2 * (dh * h).sum(1) - (dy * y).sum(0)
            out.log_scales["value"] += both.view(-1, groups, dim).sum(1).flatten()
        dy = dy / scale
        if at.r1 is not None:
            out.r1 += z @ dy.T
            dy = at.r1 @ dy
        if turn is not None:
            per_column = weight.view(-1, heads, dim).permute(1, 2, 0) @ dy.view(-1, heads, dim).transpose(0, 1)
            right = turn @ (scale[:, None] * dh * scale).view(heads, dim, -1)  # blockdiag(R2) · dH'
            mixed = 2 * self.covariances["o"] @ right.flatten(0, 1)
            mixed = mixed.view(heads, dim, heads, dim).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            out.r2 += (per_column + mixed).view(-1, groups, dim, dim).sum(1)

    def _down(self, at: LayerVariables, out: LayerGradient, columns, generator) -> None:
        weight, cost, size = self.down, self.down_cost, self.form.group_size
        scale = at.log_scales["up"].exp() if "up" in at.log_scales else None
        blocks = len(cost) // size
        drawn = None
        if columns is not None and columns < len(cost):
            count = max(1, columns // size)
            drawn = torch.randperm(blocks, generator=generator)[:count].to(weight.device)
            drawn = (drawn[:, None] * size + torch.arange(size, device=weight.device)).flatten()
            weight, cost = weight[:, drawn], cost[drawn] * (blocks / count)
            scale = None if scale is None else scale[drawn]
        y = weight if at.r1 is None else at.r1.T @ weight
        if scale is not None:
            y, cost = y / scale, cost * scale.square()
        loss, dy, along = self._writer("down_proj", y, cost, at, out)
        out.losses["down"] = float(loss)
        if scale is not None:
            gradient = 2 * cost * along - (dy * y).sum(0)
            if drawn is not None:
                gradient = torch.zeros_like(self.down_cost).to(gradient).index_copy_(0, drawn, gradient)
            out.log_scales["up"] += gradient
            dy = dy / scale
        if at.r1 is not None:
            out.r1 += weight @ dy.T
