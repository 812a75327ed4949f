"""Step of gpu_check.py that learns an OptRot rotation of a whole 8B-shaped model, timed from end to end.

The weights are drawn on the device, layer by layer, from a seed: nothing is read from disk or kept. On device
"cpu" the model is tiny and only the step's own code is checked.
"""

from __future__ import annotations

import time

import torch
from gpu_road import check, outcome, synchronize

from optrot_edge.models.config import ModelConfig
from optrot_edge.rotations.fuse import fuse_layer
from optrot_edge.rotations.optrot import OptRotOptions, initial_rotation, learn
from optrot_edge.rotations.rotation import ORTHOGONALITY, orthogonality_error

RANK = 4  # directions that all matrices of a model share and a rotation can spread
SHARE = 2.0  # their variance over that of the noise beside them
# With many rows Σ Y⁴ falls to 9 / (9 + 8 / RANK) = 0.82 of a random rotation's, that of equally loud channels.
DESCENT = 0.95
LOSS_TOLERANCE = 1e-4  # relative: what the learner reports against the fourth powers of the fused weights
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class StreamedModel:
    """A Llama of `config` whose layer is drawn anew at every reading; as much of a reader as `learn` takes.

    Weights are heavy-tailed noise plus RANK loud directions of the residual stream, so that there is
    something to learn; gains scatter about 1.
    """

    def __init__(self, config: ModelConfig, device: str, seed: int = 0):
        self.config, self.device, self.seed = config, device, seed
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.randn(config.hidden_size, RANK, generator=generator, device=device)
        self.directions = torch.linalg.qr(drawn)[0].T.contiguous()

    def _rows(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """`count` rows [hidden] of unit-variance noise and loud directions, scaled to 0.02."""
        hidden = self.config.hidden_size
        z = torch.randn(count, hidden, generator=generator, device=self.device)
        z.mul_(z.abs()).mul_(3**-0.5)
        loud = torch.randn(count, RANK, generator=generator, device=self.device) * (SHARE * hidden / RANK) ** 0.5
        return z.addmm_(loud, self.directions).mul_(0.02)

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Decoder layer `index` on the device, the same at every call."""
        c = self.config
        generator = torch.Generator(self.device).manual_seed(1000 * self.seed + index + 1)
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        rows = dict(zip(MATRICES, (query, kv, kv, query, *(c.intermediate_size,) * 3), strict=True))
        layer = {}
        for name, count in rows.items():
            matrix = self._rows(count, generator)  # rows in the residual basis: writers are turned
            layer[f"{name}_proj.weight"] = matrix.T.contiguous() if name in ("o", "down") else matrix
        for name in ("attn_norm", "mlp_norm"):
            scatter = torch.randn(c.hidden_size, generator=generator, device=self.device)
            layer[f"{name}.weight"] = 1 + 0.1 * scatter
        return {name: tensor.to(dtype) for name, tensor in layer.items()}

    def draw_all(self) -> None:
        """Draw every layer once and drop it: what a pass costs before any learning."""
        for index in range(self.config.num_hidden_layers):
            self.layer(index)


def shape_of(device: str) -> tuple[ModelConfig, dict[str, OptRotOptions]]:
    """Llama-3.1-8B's sizes with the default draw, and five full steps; on "cpu" a tiny model."""
    if device == "cuda":
        sizes, draw, steps = (4096, 14336, 32, 32, 8, 128), 20_000, (60, 5)
    else:
        sizes, draw, steps = (64, 128, 2, 4, 2, 16), 400, (20, 5)
    hidden, intermediate, layers, heads, kv_heads, head_dim = sizes
    config = ModelConfig("llama", hidden, intermediate, layers, heads, kv_heads, head_dim, 256, 1e-5, 10000.0, 4096,
                         tie_word_embeddings=False)
    return config, {"sampled": OptRotOptions(solver="polar", steps=steps[0], rows=draw),
                    "full": OptRotOptions(solver="polar", steps=steps[1], rows=None)}


@torch.no_grad()
def fused_loss(model: StreamedModel, rotation, device: str) -> float:
    """Σ of the fourth powers of all rotated weights, from the matrices that an exporter would write."""
    total = 0.0
    for index in range(model.config.num_hidden_layers):
        layer = fuse_layer(model.layer(index), rotation, index, model.config)
        total += sum(float(layer[f"{name}_proj.weight"].square().square().sum(dtype=torch.float64))
                     for name in MATRICES)
    return total


def clocked(place: str, function, *arguments, **named):
    """Wall seconds of one call on `place`, and its result."""
    synchronize(place)
    start = time.perf_counter()
    value = function(*arguments, **named)
    synchronize(place)
    return time.perf_counter() - start, value


def optrot_8b_step(device: str) -> dict:
    """A sampled run at the default setting and a few full steps: time, memory, descent, exactness."""
    config, settings = shape_of(device)
    model = StreamedModel(config, device)
    generator = torch.Generator().manual_seed(0)
    start_s, start = clocked(device, initial_rotation, config, {"r1", "r2"}, generator)
    model.layer(0)  # warms up
    draw_s, _ = clocked(device, model.draw_all)
    timings = [{"what": "random Hadamard start, on the CPU", "seconds": start_s, "gib": None},
               {"what": "drawing all layers once (part of the first pass)", "seconds": draw_s, "gib": None}]
    checks = []
    for name, options in settings.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ticks = [time.perf_counter()]
        taken, learned = clocked(device, learn, model, start, options, torch.Generator().manual_seed(1), device=device,
                                 progress=lambda *_, ticks=ticks: ticks.append(time.perf_counter()))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
        passes = sorted(late - early for early, late in zip(ticks[1:], ticks[2:], strict=False))
        timings += [{"what": f"{name}: {options.steps} steps, from start to projected result", "seconds": taken,
                     "gib": peak}]
        if passes:
            timings += [{"what": f"{name}: a pass, median of {len(passes)}", "seconds": passes[len(passes) // 2],
                         "gib": None}]
        loss, loss_start = learned.recipe["loss"], learned.recipe["loss_start"]
        checks += [check(f"{name}: loss over the start's", loss / loss_start, DESCENT),
                   check(f"{name}: loss against the fused weights'",
                         abs(loss / fused_loss(model, learned, device) - 1), LOSS_TOLERANCE),
                   check(f"{name}: orthogonality", max(map(orthogonality_error, (learned.r1, learned.r2))),
                         ORTHOGONALITY)]
    return outcome(checks, timings, statistic="one run") | {"layers": config.num_hidden_layers,
                                                           "hidden": config.hidden_size}
