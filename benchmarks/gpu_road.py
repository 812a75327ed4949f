"""Steps of gpu_check.py for what the kernels serve: learning rotations, fitting grids, GPTQ.

Each is run on the device and, from the same seed, on the CPU in one process; then timed at the shapes of
Llama-3.1-8B. On device "cpu" everything shrinks and only the steps' own code is checked.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from optrot_edge.checkpoint import CheckpointWriter
from optrot_edge.kernels.fourth_power import fourth_power
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import get_family
from optrot_edge.models.forward import logits
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
from optrot_edge.quantize.statistics import MeanProduct, output_error
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.learner import PASS_STEPS
from optrot_edge.rotations.optrot import OptRotOptions, cayley_step, initial_rotation, learn, polar_step
from optrot_edge.rotations.rotation import ORTHOGONALITY, orthogonality_error
from optrot_edge.tensor_types import tensor_types

# Bounds on what the order of float32 sums may change: about a hundred times what rounding every product and
# sum differently changes on a CPU. In sampled steps it also swaps a row now and then. The GPU's gradients are
# tf32 where the CPU's are float32, which alone may take a good part of the full polar steps' bound.
LOSS_TOLERANCE = {"full": 3e-4, "sampled": 1e-3}
LOGITS_TOLERANCE = 1e-4  # relative Frobenius error of the rotated model on the device against the plain one
HESSIAN_TOLERANCE = 1e-5  # relative Frobenius error: float32 products
FP16_ULP = 2**-10  # largest relative size of a float16's last place
SAME_SCALES = 0.999  # share of groups within that
OUTPUT_TOLERANCE = 0.01  # relative difference of tr(ΔHΔᵀ)
WORST_OUTPUT = 0.05  # the same, for the worst matrix of a model: the smallest ones scatter
TIMED_RUNS = 3


class RandomModel:
    """A Llama of `config` in memory: heavy-tailed weights and random gains. The interface of a reader."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.config, self.generator = config, torch.Generator().manual_seed(seed)
        self.layers = [self._layer() for _ in range(config.num_hidden_layers)]
        self.outer = {"embed": self._heavy(config.vocab_size, config.hidden_size),
                      "norm": self._gains(), "head": self._heavy(config.vocab_size, config.hidden_size)}

    def _heavy(self, rows: int, columns: int) -> torch.Tensor:
        z = torch.randn(rows, columns, generator=self.generator)
        return z.mul_(z.abs()).mul_(columns**-0.5)  # kurtosis 105/9

    def _gains(self) -> torch.Tensor:
        return 0.2 + 1.6 * torch.rand(self.config.hidden_size, generator=self.generator)

    def _layer(self) -> dict[str, torch.Tensor]:
        c = self.config
        query, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        shapes = {"q": (query, c.hidden_size), "k": (kv, c.hidden_size), "v": (kv, c.hidden_size),
                  "o": (c.hidden_size, query), "gate": (c.intermediate_size, c.hidden_size),
                  "up": (c.intermediate_size, c.hidden_size), "down": (c.hidden_size, c.intermediate_size)}
        layer = {f"{name}_proj.weight": self._heavy(*shape) for name, shape in shapes.items()}
        return {"attn_norm.weight": self._gains(), "mlp_norm.weight": self._gains(), **layer}

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in self.layers[index].items()}

    def embedding(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.outer["embed"].to(dtype)

    def final_norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.outer["norm"].to(dtype)

    def lm_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.outer["head"].to(dtype)

    def rows(self, name: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.outer["head" if name == "lm_head.weight" else "embed"][start:stop].to(dtype)


def random_model(hidden: int, intermediate: int, heads: int, kv_heads: int, *, layers: int = 2,
                 vocab: int = 256) -> RandomModel:
    """RandomModel of these sizes."""
    return RandomModel(ModelConfig("llama", hidden, intermediate, layers, heads, kv_heads, hidden // heads, vocab,
                                   1e-5, 10000.0, 4096, tie_word_embeddings=False))


def synchronize(device: str) -> None:
    """Wait for what the device still computes."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, function: Callable, *arguments, runs: int = TIMED_RUNS):
    """Median wall time in milliseconds of `runs` calls after one that warms up, and the last result."""
    series = []
    for _ in range(runs + 1):
        synchronize(device)
        start = time.perf_counter()
        result = function(*arguments)
        synchronize(device)
        series.append(1e3 * (time.perf_counter() - start))
    return sorted(series[1:])[runs // 2], result


def check(name: str, measured: float, bound: float, *, at_least: bool = False) -> dict:
    """One row of the table of checks; NaN never passes."""
    passed = measured >= bound if at_least else measured <= bound
    return {"check": name, "measured": measured, "bound": bound, "passed": passed}


def outcome(checks: list[dict], timings: list[dict], *, statistic: str = f"median of {TIMED_RUNS}") -> dict:
    """A step's result; failed checks are named on stdout."""
    for row in checks:
        if not row["passed"]:
            print(f"OUT OF TOLERANCE {row}")
        if not abs(row["measured"]) < float("inf"):
            row["measured"] = str(row["measured"])  # JSON has neither NaN nor infinity
    return {"passed": all(row["passed"] for row in checks), "checks": checks, "timings": timings,
            "statistic": statistic}


def rotation_step(device: str) -> dict:
    """OptRot on the device against the CPU, then its time at Llama-3.1-8B's shapes."""
    model = random_model(512, 1024, 8, 2) if device == "cuda" else random_model(64, 128, 4, 2)
    checks = []
    for solver, rows in (("polar", 2000), ("polar", None), ("cayley", None)):
        checks += learning_checks(model, OptRotOptions(solver, 20, rows), device)
    rotation = initial_rotation(model.config, {"r1", "r2"}, torch.Generator().manual_seed(2),
                                r3_block=model.config.head_dim, r4_block=32)
    tokens = torch.randint(model.config.vocab_size, (4, 48), generator=torch.Generator().manual_seed(3))
    expected = logits(model, tokens, dtype=torch.float64)
    actual = logits(RotatedModel(model, rotation, device), tokens, device=device).cpu()
    checks.append(check("rotated logits", float((actual - expected).norm() / expected.norm()), LOGITS_TOLERANCE))
    return outcome(checks, learning_times(device))


def learning_checks(model, options: OptRotOptions, device: str) -> list[dict]:
    """Loss, descent and orthogonality of one setting, learned on the device and on the CPU."""
    learned = []
    for place in (device, "cpu"):
        generator = torch.Generator().manual_seed(0)
        start = initial_rotation(model.config, {"r1", "r2"}, generator, r4_block=32)
        learned.append(learn(model, start, options, generator, device=place))
    (there, here), draw = learned, "full" if options.rows is None else "sampled"
    name, loss = f"{options.solver} {draw}", here.recipe["loss"]
    return [check(f"{name}: loss against the CPU's", abs(there.recipe["loss"] / loss - 1), LOSS_TOLERANCE[draw]),
            check(f"{name}: loss over the start's", there.recipe["loss"] / there.recipe["loss_start"], 0.99),
            check(f"{name}: orthogonality", max(map(orthogonality_error, (there.r1, there.r2))), ORTHOGONALITY)]


def learning_times(device: str) -> list[dict]:
    """A step, its part of a pass over two layers whose weights come from host memory, and the parts of one on R1."""
    big = device == "cuda"
    model = random_model(4096, 14336, 32, 8) if big else random_model(64, 128, 4, 2)
    hidden, rows = model.config.hidden_size, 20_000 if big else 200
    generator = torch.Generator().manual_seed(0)
    start = initial_rotation(model.config, {"r1", "r2"}, generator)
    ticks = []

    def tick(done: int, total: int) -> None:
        synchronize(device)
        ticks.append((done, time.perf_counter()))

    options = OptRotOptions("polar", PASS_STEPS * (TIMED_RUNS + 1), rows, memory=0)  # no layer is kept on the device
    learned = learn(model, start, options, generator, device=device, progress=tick)
    projection_ms = 1e3 * (time.perf_counter() - ticks[-1][1])
    steps = sorted(1e3 * (late - early) / (last - first)
                   for (first, early), (last, late) in zip(ticks, ticks[1:], strict=False))
    r = learned.r1.to(device, torch.float32)
    x = torch.randn(rows, hidden, generator=generator).to(device)
    gradient_ms, (_, gradient) = timed(device, fourth_power, x, r)
    parts = {"step of R1 and R2, 2 layers streamed": steps[len(steps) // 2], "gradient of R1": gradient_ms,
             "polar step of R1": timed(device, polar_step, r, gradient, 0.1)[0],
             "cayley step of R1": timed(device, cayley_step, r, gradient, 1.0)[0],
             "projection on the CPU and final losses (once)": projection_ms}
    return [{"what": what, "hidden": hidden, "rows": rows, "ms": ms} for what, ms in parts.items()]


def quantizer_step(device: str) -> dict:
    """Grids, GPTQ and whole layers on the device against the CPU, then times at Llama-3.1-8B's shapes."""
    checks = [*matrix_checks(device), *layer_checks(device)]
    return outcome(checks, quantizing_times(device))


def calibration(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    """Correlated activations [tokens, width] of unequal channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width // 4, width, generator=generator) * width**-0.5
    x = torch.randn(tokens, width // 4, generator=generator) @ mix
    x += 0.3 * torch.randn(tokens, width, generator=generator)
    return x * (0.2 + 2 * torch.rand(width, generator=generator))


def hessian_of(x: torch.Tensor, device: str) -> torch.Tensor:
    """E[xxᵀ] accumulated on the device in eight parts."""
    total = MeanProduct(x.shape[1], x.shape[1], device)
    for part in x.chunk(8):
        total.add(part.to(device))
    return total.mean()


def matrix_checks(device: str) -> list[dict]:
    """One matrix through MeanProduct, Grid.fit and GPTQ on each side."""
    size = 1024 if device == "cuda" else 128
    x, model = calibration(4 * size, size), random_model(size, size, 4, 4, layers=1)
    weight = model.layer(0)["gate_proj.weight"]
    here, there = hessian_of(x, "cpu"), hessian_of(x, device)
    checks = [check("Hessian", float((there.cpu() - here).norm() / here.norm()), HESSIAN_TOLERANCE)]
    for name in ("q4_0", "q4_1", "q8_0", "int4-g64-zero"):
        grid, errors, fitted = Grid(name), [], []
        for hessian, place in ((here, "cpu"), (there, device)):
            w = weight.to(place)
            params = grid.fit(w, hessian.diagonal())
            codes = gptq(w, prepare_hessian(hessian, damp=0.1), grid, params)
            delta = weight.double() - grid.decode(codes, params).cpu().double()
            errors.append(output_error(delta, here))
            fitted.append(params.scales.cpu())
        same = float(((fitted[1] - fitted[0]).abs() <= FP16_ULP * fitted[0].abs()).double().mean())
        checks += [check(f"{name}: share of equal scales", same, SAME_SCALES, at_least=True),
                   check(f"{name}: GPTQ's output error", abs(errors[1] / errors[0] - 1), OUTPUT_TOLERANCE)]
    return checks


def layer_checks(device: str) -> list[dict]:
    """SequentialQuantizer over a rotated model on each side: how much the matrices' output errors differ."""
    model = random_model(512, 1024, 8, 2) if device == "cuda" else random_model(64, 128, 4, 2)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.config.vocab_size, (16, 128), generator=generator)
    rotation = initial_rotation(model.config, {"r1", "r2"}, generator, r4_block=32)
    reports = []
    for place in ("cpu", device):
        rotated = RotatedModel(model, rotation, place)
        types = tensor_types(get_family("llama"), rotated.config, Recipe(rotation="none"))
        quantizer = SequentialQuantizer(rotated, QuantizerOptions(types, device=place), tokens)
        with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder) / "checkpoint") as writer:
            quantizer.run(writer)
        reports.append(quantizer.reports)
    key = {name: "output_error" if name.startswith("layers.") else "relative_mse" for name in reports[0]}
    apart = [abs(reports[1][name][key[name]] / reports[0][name][key[name]] - 1) for name in key]
    return [check(f"SequentialQuantizer: mean of {len(key)} matrices", sum(apart) / len(apart), OUTPUT_TOLERANCE),
            check("SequentialQuantizer: worst of them", max(apart), WORST_OUTPUT)]


def quantizing_times(device: str) -> list[dict]:
    """Fit, Hessian of 16384 tokens, factorisation and GPTQ of matrices [4096, in]."""
    rows = []
    out, tokens, widths = (4096, 16384, (4096, 14336)) if device == "cuda" else (64, 256, (64, 128))
    for width in widths:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(out, width, generator=generator).to(device)
        x = torch.randn(tokens, width, generator=generator).to(device)
        hessian_ms, hessian = timed(device, hessian_of, x, device)
        row = {"out": out, "in": width, "tokens": tokens, "hessian_ms": hessian_ms}
        row["cholesky_ms"], prepared = timed(device, prepare_hessian, hessian)
        for name in ("q4_0", "q4_1"):
            grid = Grid(name)
            row[f"{name}_fit_ms"], params = timed(device, grid.fit, weight, hessian.diagonal())
            row[f"{name}_gptq_ms"], _ = timed(device, gptq, weight, prepared, grid, params, runs=1)
        rows.append(row)
    return rows
