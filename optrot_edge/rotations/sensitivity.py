"""How much a rounding error in each row of each linear costs, in KL divergence from the float model.

For a small error Δ in a weight matrix, KL = ½ E[(Σ_t g_tᵀ Δ x_t)²] over a text, g the gradient of
−log p(label) with respect to the linear's output, labels drawn from the model itself (Fisher information;
Martens, arXiv 1412.1193). Δ is what GPTQ leaves on the grid in question when nothing is rotated, and the
sum runs over a window's tokens before it is squared. Both matter: E[g²] and E[(Δx)²] apart would overrate v,
because GPTQ errs least on the few inputs (attention sinks) on which most depends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from optrot_edge.checkpoint import GridSpec
from optrot_edge.gridspec import fitting_type
from optrot_edge.models import forward
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.refit import row_losses
from optrot_edge.quantize.streams import Stream, embedded, native_chunks, picked_rows
from optrot_edge.rotations.covariance import INPUTS, rotate_covariances
from optrot_edge.rotations.rotation import Rotation


def output_sensitivity(source, tokens: torch.Tensor, covariances, grid: GridSpec | str, generator: torch.Generator,
                       *, damp: float = 0.1, device: str = "cpu", scratch: Path | None = None,
                       progress: Callable[[int, int], None] | None = None
                       ) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
    """Per layer, the weight g [out] of every linear's rows on `tokens` [windows, length]; and the gradient of
    −log p(label) at the embedding's output [windows, length, hidden].

    `½ Σ_i g_i (ΔHΔᵀ)_ii` is the KL per token, in nats, that an error Δ of one matrix costs, H its input's
    covariance. Rows share a matrix's cost by E[g²]. `covariances` are of the same model; labels are drawn with
    `generator` (CPU). One layer is held at a time, and the residual stream of all tokens before every layer
    (tokens × hidden × layers × 4 bytes), in the folder `scratch`, if given.
    """
    config, grid_name = source.config, grid if isinstance(grid, str) else grid.name
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    streams = [embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids), scratch)]
    for index in range(config.num_hidden_layers):
        layer = load_layer(source, index, device)
        streams.append(forward_stream(streams[-1], layer, config, rope, device, scratch))
    gradient = head_gradient(source, streams.pop(), generator, device)
    found = []
    for index in reversed(range(config.num_hidden_layers)):
        layer = load_layer(source, index, device)
        stored = rotate_covariances(covariances.layer(index, device), Rotation("none"), index, layer, config)
        errors = _gptq_errors(layer, stored, grid_name, damp)
        found.append(_backward(streams[-1], gradient, layer, errors, config, rope, device))
        streams.pop().close()
        if progress:
            progress(len(found), config.num_hidden_layers)
    return found[::-1], gradient


def _gptq_errors(layer, stored: dict, grid_name: str, damp: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For every linear, Δ [out, in] that GPTQ leaves and the mean square [out] of Δx over the calibration text."""
    out = {}
    for kind, names in INPUTS.items():
        h = stored[kind]
        weights = [layer[f"{name}.weight"] for name in names]
        stacked, prepared = torch.cat(weights), prepare_hessian(h, damp=damp)
        grid = Grid(fitting_type(grid_name, len(h)))
        params = grid.fit(stacked, h.diagonal())
        error = grid.decode(gptq(stacked, prepared, grid, params), params) - stacked
        power = row_losses(error.to(h), h).cpu()
        sizes = [len(weight) for weight in weights]
        out |= dict(zip(names, zip(error.split(sizes), power.split(sizes), strict=True), strict=True))
    return out


def load_layer(source, index: int, device: str) -> dict:
    """A decoder layer in float32."""
    return {k: v.to(device) for k, v in source.layer(index, torch.float32).items()}


@torch.no_grad()
def forward_stream(stream: Stream, layer, config, rope, device: str, scratch: Path | None = None) -> Stream:
    """The residual stream after a decoder layer, from the one before it."""
    after = Stream(*stream.shape, scratch)
    for windows in stream.batches(2):
        after.write(windows, forward.decoder_layer(stream.read(windows).to(device), layer, config, rope).cpu())
    return after


def head_gradient(source, stream: Stream, generator: torch.Generator, device: str) -> torch.Tensor:
    """Gradient of Σ −log p(drawn label) with respect to the last layer's output."""
    norm, head = source.final_norm(torch.float32).to(device), source.lm_head(torch.float32)
    head = (source.embedding(torch.float32) if head is None else head).to(device)
    mix = forward.head_mix(source)
    mix = None if mix is None else mix.to(device)
    out = torch.empty(stream.shape)
    for windows in stream.batches(1):  # logits of one window at a time
        x = stream.read(windows).to(device).requires_grad_()
        with torch.enable_grad():
            hidden = forward.head_input(x, norm, mix, source.config.rms_norm_eps)
        p = F.linear(hidden.detach(), head).softmax(-1)
        label = torch.multinomial(p.flatten(0, 1).cpu(), 1, generator=generator).to(device)
        p.flatten(0, 1).scatter_add_(1, label, torch.full_like(label, -1, dtype=p.dtype))
        hidden.backward(p @ head)
        out[windows] = x.grad.cpu()
    return out


def _backward(stream, gradient, layer, errors, config, rope, device) -> dict[str, torch.Tensor]:
    """The layer's row weights; `gradient` becomes that of the layer's input, in place."""
    seen: dict[str, tuple] = {}

    def tap(name, x, y):
        y.retain_grad()
        seen[name] = (x.detach(), y)
        return y

    shape = {name: torch.zeros_like(power) for name, (_, power) in errors.items()}
    cost = dict.fromkeys(errors, 0.0)
    for windows in stream.batches(1):
        x, grad = stream.read(windows).to(device).requires_grad_(), gradient[windows]
        with torch.enable_grad():
            y = forward.decoder_layer(x, {**layer, "tap": tap}, config, rope)
        y.backward(grad.to(device))
        for name, (inputs, output) in seen.items():
            g, error = output.grad[0], inputs[0] @ errors[name][0].T
            shape[name] += g.square().sum(0).double().cpu()
            cost[name] += float((g * error).sum(0).square().sum())
        grad.copy_(x.grad)
    count = stream.shape[0] * stream.shape[1]  # the few tokens here may lack the rare ones that rule ΔHΔᵀ
    return {name: shape[name] * (cost[name] / max(count * float(shape[name] @ errors[name][1].double()), 1e-300))
            for name in shape}
