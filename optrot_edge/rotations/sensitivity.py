"""How much a rounding error in each row of each linear costs, in KL divergence from the float model.

For a small error Δ in a weight matrix, KL = ½ E[(Σ_t g_tᵀ Δ x_t)²] over a text, g the gradient of
−log p(label) with respect to the linear's output, labels drawn from the model itself (Fisher information;
Martens, arXiv 1412.1193). Δ is what GPTQ leaves on the grid in question when nothing is rotated, and the
sum runs over a window's tokens before it is squared. Both matter: E[ggᵀ] and E[(Δx)²] apart would overrate v,
because GPTQ errs least on the few inputs (attention sinks) on which most depends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from optrot_edge.checkpoint import GridSpec
from optrot_edge.models import forward
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations.covariance import INPUTS
from optrot_edge.rotations.layer_store import LayerStore


def output_sensitivity(source, tokens: torch.Tensor, covariances, grid: GridSpec | str, generator: torch.Generator,
                       *, damp: float = 0.1, device: str = "cpu", folder: str | Path | None = None,
                       progress: Callable[[int, int], None] | None = None) -> LayerStore:
    """Per layer, what errors in the rows of every linear cost on `tokens` [windows, length].

    `½ tr(G ΔHΔᵀ)` is the KL per token, in nats, that an error Δ of one matrix costs, H its input's
    covariance. Where a rotation mixes the rows, G is a matrix, from `E[g gᵀ]`: [out, out] of o_proj and down_proj,
    [kv_heads, head_dim, head_dim] of v_proj; of other linears its diagonal [out]. `covariances` are of the
    same model; labels are drawn with `generator` (CPU). The result is kept on disk in a new folder under `folder`,
    8 hidden² bytes and a little per layer. One layer is held at a time, and the residual stream of all tokens before
    every layer (tokens × hidden × layers × 4 bytes).
    Raises InputError when the disk is full; nothing is left behind then.
    """
    config = source.config
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    streams = [F.embedding(tokens, source.embedding(torch.float32))]
    for index in range(config.num_hidden_layers):
        layer = _load(source, index, device)
        streams.append(_forward(streams[-1], layer, config, rope, device))
    gradient = _head_gradient(source, streams.pop(), generator, device)
    found = LayerStore(folder, "sensitivity")
    try:
        for index in reversed(range(config.num_hidden_layers)):
            layer = _load(source, index, device)
            errors = _gptq_errors(layer, covariances.layer(index, device), Grid(grid), damp)
            found.write(index, _backward(streams.pop(), gradient, layer, errors, config, rope, device))
            if progress:
                progress(config.num_hidden_layers - index, config.num_hidden_layers)
    except BaseException:
        found.close()
        raise
    return found


def _gptq_errors(layer, stored: dict, grid: Grid, damp: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For every linear, Δ [out, in] that GPTQ leaves and the mean square [out] of Δx over the calibration text."""
    out = {}
    for kind, names in INPUTS.items():
        h = stored[kind]
        if f"{kind}_norm.weight" in layer:
            gain = layer[f"{kind}_norm.weight"].to(h)
            h = gain[:, None] * h * gain
        weights = [layer[f"{name}.weight"] for name in names]
        stacked, prepared = torch.cat(weights), prepare_hessian(h, damp=damp)
        params = grid.fit(stacked, h.diagonal())
        error = grid.decode(gptq(stacked, prepared, grid, params), params) - stacked
        power = ((error.to(h) @ h) * error).sum(1).cpu()
        sizes = [len(weight) for weight in weights]
        out |= dict(zip(names, zip(error.split(sizes), power.split(sizes), strict=True), strict=True))
    return out


def _load(source, index: int, device: str) -> dict:
    return {k: v.to(device) for k, v in source.layer(index, torch.float32).items()}


@torch.no_grad()
def _forward(stream, layer, config, rope, device):
    return torch.cat([forward.decoder_layer(part.to(device), layer, config, rope).cpu() for part in stream.split(2)])


def _head_gradient(source, stream, generator, device):
    """Gradient of Σ −log p(drawn label) with respect to the last layer's output."""
    norm, head = source.final_norm(torch.float32).to(device), source.lm_head(torch.float32)
    head = (source.embedding(torch.float32) if head is None else head).to(device)
    out = torch.empty_like(stream)
    for part, target in zip(stream.split(1), out.split(1), strict=True):  # logits of one window at a time
        x = part.to(device).requires_grad_()
        with torch.enable_grad():
            hidden = forward.rms_norm(x, norm, source.config.rms_norm_eps)
        p = F.linear(hidden.detach(), head).softmax(-1)
        label = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=generator).to(device)
        p.flatten(0, 1).scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
        hidden.backward(p @ head)
        target.copy_(x.grad)
    return out


def _backward(stream, gradient, layer, errors, config, rope, device) -> dict[str, torch.Tensor]:
    """The layer's row weights; `gradient` becomes that of the layer's input, in place."""
    seen: dict[str, tuple] = {}

    def tap(name, x, y):
        y.retain_grad()
        seen[name] = (x.detach(), y)
        return y

    blocks = {"o_proj": 1, "down_proj": 1, "v_proj": config.num_key_value_heads}  # rows that a rotation mixes
    second = dict.fromkeys(errors, 0.0)
    cost = dict.fromkeys(errors, 0.0)
    for part, grad in zip(stream.split(1), gradient.split(1), strict=True):
        x = part.to(device).requires_grad_()
        with torch.enable_grad():
            y = forward.decoder_layer(x, {**layer, "tap": tap}, config, rope)
        y.backward(grad.to(device))
        for name, (inputs, output) in seen.items():
            g, error = output.grad[0], inputs[0] @ errors[name][0].T
            if name in blocks:
                per_block = g.view(len(g), blocks[name], -1).transpose(0, 1)
                second[name] += per_block.mT @ per_block
            else:
                second[name] += g.square().sum(0)
            cost[name] += float((g * error).sum(0).square().sum())
        grad.copy_(x.grad)
    count = stream.shape[0] * stream.shape[1]  # the few tokens here may lack the rare ones that rule ΔHΔᵀ
    found = {}
    for name, moment in second.items():
        rows = moment if moment.dim() == 1 else moment.diagonal(dim1=1, dim2=2).flatten()
        share = cost[name] / max(count * float(rows.cpu().double() @ errors[name][1].double()), 1e-300)
        found[name] = share * (moment[0] if name in ("o_proj", "down_proj") else moment).cpu()
    return found
