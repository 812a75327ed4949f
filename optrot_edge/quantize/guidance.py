"""How much the end of the model depends on each calibration token: weights for what GPTQ minimises.

GuidedQuant (arXiv 2505.07004) weights a token t in the Hessian of a group of output channels by the mean over the group
of (∂ℓ/∂y_tj)², y the linear's outputs: `H = Σ_t w_t x_t x_tᵀ`. Here the linears that read one input are one group, so
that they keep sharing a Hessian. ℓ is −log p(label), labels drawn from the model itself (Fisher information). Rotations
that leave the model's function alone leave these means (nearly) alone too: one pass over the original serves them all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from optrot_edge.models import forward
from optrot_edge.quantize.sequential import STAGES
from optrot_edge.quantize.streams import embedded, native_chunks, picked_rows
from optrot_edge.rotations.sensitivity import forward_stream, head_gradient, load_layer

TEMPER = 0.5  # power of the mean squares, lest a few tokens be all that a Hessian is made of
CHUNK_TOKENS = 4096  # whose residual streams before every layer are held at once
READERS = {names[0]: names for names in STAGES}


def token_weights(source, tokens: torch.Tensor, *, seed: int = 0, device: str = "cpu",
                  progress: Callable[[int, int], None] | None = None) -> list[dict[str, torch.Tensor]]:
    """Per layer, by the first name of a stage: weights [windows, length] of `tokens`, mean 1.

    `source` is the float model. One layer is held at a time, and the streams of `CHUNK_TOKENS` before every layer.
    """
    generator, found = torch.Generator().manual_seed(seed), []
    chunks = tokens.split(max(1, CHUNK_TOKENS // tokens.shape[1]))
    for done, chunk in enumerate(chunks, 1):
        found.append(_of_chunk(source, chunk, generator, device))
        if progress:
            progress(done, len(chunks))
    layers = [{stage: torch.cat([part[stage] for part in parts]) for stage in READERS}
              for parts in zip(*found, strict=True)]
    layers = [{stage: squares**TEMPER for stage, squares in layer.items()} for layer in layers]
    return [{stage: weights / weights.mean() for stage, weights in layer.items()} for layer in layers]


def _of_chunk(source, tokens: torch.Tensor, generator: torch.Generator, device: str) -> list[dict[str, torch.Tensor]]:
    config = source.config
    rope = forward.rope_tables(config, tokens.shape[1], device=device)
    streams = [embedded(tokens, lambda ids: picked_rows(native_chunks(source), ids))]
    for index in range(config.num_hidden_layers):
        streams.append(forward_stream(streams[-1], load_layer(source, index, device), config, rope, device))
    gradient = head_gradient(source, streams.pop(), generator, device)
    found = []
    for index in reversed(range(config.num_hidden_layers)):
        found.append(_backward(streams.pop(), gradient, load_layer(source, index, device), config, rope, device))
    return found[::-1]


def _backward(stream, gradient, layer, config, rope, device) -> dict[str, torch.Tensor]:
    """One layer's mean squared gradients [windows, length]; `gradient` becomes that of its input, in place."""
    outputs: dict[str, torch.Tensor] = {}

    def tap(name, x, y):
        y.retain_grad()
        outputs[name] = y
        return y

    found = {stage: [] for stage in READERS}
    for windows in stream.batches(1):
        x, grad = stream.read(windows).to(device).requires_grad_(), gradient[windows]
        with torch.enable_grad():
            y = forward.decoder_layer(x, {**layer, "tap": tap}, config, rope)
        y.backward(grad.to(device))
        for stage, names in READERS.items():
            squares = torch.cat([outputs[name].grad for name in names], -1).square()
            found[stage].append(squares.mean(-1).cpu())
        grad.copy_(x.grad)
    return {stage: torch.cat(parts) for stage, parts in found.items()}
