"""Step of gpu_check.py that times GPTQ: against its plain loop, against its products alone, and over whole 8B layers.

On device "cpu" shapes shrink and only the step's own code is checked.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from gptq_loop import plain_gptq
from gpu_8b import StreamedModel
from gpu_road import OUTPUT_TOLERANCE, calibration, check, hessian_of, outcome, synchronize
from gpu_speed import milliseconds, products_in

from optrot_edge.checkpoint import CheckpointWriter
from optrot_edge.kernels.gptq import BLOCK
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import get_family
from optrot_edge.quantize.gptq import PreparedHessian, gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
from optrot_edge.quantize.statistics import output_error
from optrot_edge.recipe import Recipe
from optrot_edge.tensor_types import tensor_types

# Matrices [out, in] of Llama-3.1-8B and of SmolLM2-135M, and whether the bars hold them: small ones are all launches.
SHAPES = {"q, o 8B": (4096, 4096, True), "gate, up 8B": (14336, 4096, True), "down 8B": (4096, 14336, True),
          "gate, up 135M": (3072, 576, False), "down 135M": (576, 1536, False)}
TINY = {"tiny": (40, 96, False)}
OVER_PLAIN = 20  # times as fast as the plain loop, at least
OVER_PRODUCTS = 3  # times as long as the trailing products alone, at most
LAYERS_OF_8B = 32


def gptq_step(device: str) -> dict:
    """Times of single matrices, of the Hessian's sum and of whole layers; correctness against the plain loop."""
    checks, rows, failures = [], [], {}
    for name, (out, width, barred) in (SHAPES if device == "cuda" else TINY).items():
        row, found, failed = matrix_row(device, name, out, width)
        rows.append(row)
        checks += found + (bars(name, row) if barred else [])
        failures |= failed
    for what, text in failures.items():
        print(f"{what} did not run: {text}")
    result = outcome(checks, layer_times(device), statistic="median of 5 after 3; plain loop and layers: one run")
    return result | {"rows": rows, "hessian": hessian_rows(device), "did_not_run": failures}


def bars(name: str, row: dict) -> list[dict]:
    """The row against what the kernel promises."""
    return [check(f"{name}: times as fast as the plain loop", row["over_plain"], OVER_PLAIN, at_least=True),
            check(f"{name}: times the products alone", row["over_products"], OVER_PRODUCTS)]


def matrix_row(device: str, name: str, out: int, width: int) -> tuple[dict, list[dict], dict]:
    """One matrix on Q4_0: times in milliseconds, the check of its output error, and what did not run."""
    z = torch.randn(out, width, generator=torch.Generator().manual_seed(0)).to(device)
    weight = z * z.abs() * width**-0.5  # heavy-tailed
    hessian = hessian_of(calibration(max(4096, width) if device == "cuda" else 256, width), device)
    prepared, grid = prepare_hessian(hessian, damp=0.1), Grid("q4_0")
    params = grid.fit(weight, hessian.diagonal())
    functions = {"kernel": partial(gptq, weight, prepared, grid, params),
                 "products": products(prepared, out),
                 "factor": partial(prepare_hessian, hessian, damp=0.1),
                 "fit": partial(grid.fit, weight, hessian.diagonal()),
                 "gptqmodel": peer(weight, hessian)}
    times, failed = milliseconds(device, functions, repeats=5, ahead=False)
    plain = partial(plain_gptq, weight, prepared, grid, params, dtype=torch.float32)
    errors = [output_error((weight - grid.decode(codes, params)).double(), hessian) for codes in (gptq(
        weight, prepared, grid, params), plain())]  # the plain loop is warm by now
    synchronize(device)
    start = time.perf_counter()
    plain()
    synchronize(device)
    times["plain"] = 1e3 * (time.perf_counter() - start)
    row = {"matrix": name, "out": out, "in": width} | {f"{what}_ms": taken for what, taken in times.items()}
    row |= {"over_plain": times["plain"] / times["kernel"], "over_products": times["kernel"] / times["products"]}
    return row, [check(f"{name}: output error against the plain loop's", abs(errors[0] / errors[1] - 1),
                       OUTPUT_TOLERANCE)], failed


def products(prepared: PreparedHessian, out: int):
    """The trailing updates of all blocks, float32, and nothing between them."""
    upper = prepared.upper.float()
    width = len(upper)
    residual = torch.randn(width, out, device=upper.device)
    errors = 1e-3 * torch.randn(min(BLOCK, width), out, device=upper.device)

    def run():
        for last in range(BLOCK, width, BLOCK):
            residual[last:].addmm_(upper[last - BLOCK:last, last:].T, errors, alpha=-1)
        if width <= BLOCK:  # a single block has none; one product stands for them, so that there is a time
            residual.addmm_(upper.T, errors[:width], alpha=-1)

    return run


def peer(weight: torch.Tensor, hessian: torch.Tensor):
    """gptqmodel's quantisation of the same matrix (its factorisation and scales included), where it is installed."""
    try:
        from gptqmodel.quantization.gptq import GPTQ
    except (ImportError, OSError, RuntimeError) as error:  # it is no dependency; libraries of another CUDA fail late
        print(f"gptqmodel is left out: {error}")
        return None

    def run():
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        linear.weight.data = weight.clone()
        task = GPTQ(linear)
        task.quantizer.configure(perchannel=True)
        task.H, task.nsamples = hessian.float(), 1
        task.fasterquant(percdamp=0.1, group_size=32, actorder=True, static_groups=True)

    return run


def hessian_rows(device: str) -> list[dict]:
    """XᵀX, the sum behind every Hessian, by torch in each precision: what a kernel of our own would have to beat.

    `tflops` counts all of the square, as cuBLAS computes it; a kernel for one triangle could halve the time at most.
    """
    rows = []
    tokens, widths = (16384, (4096, 14336)) if device == "cuda" else (64, (32,))
    for width in widths:
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
        half, total = x.bfloat16(), torch.zeros(width, width, device=device)
        exact = x[:, :32].double().T @ x.double()
        mixed = {"out_dtype": torch.float32} if device == "cuda" else {}  # no such product on a CPU
        for precision in ("float32", "tf32", "bfloat16"):
            add = partial(torch.mm, half.T, half, **mixed) if precision == "bfloat16" else partial(
                torch.addmm, total, x.T, x)
            with products_in("tf32" if precision == "tf32" else "float32"):
                error = float((add()[:32].double() - exact).norm() / exact.norm())
                taken = milliseconds(device, {"kernel": add})[0]["kernel"]
            rows.append({"precision": precision, "tokens": tokens, "width": width, "ms": taken,
                         "tflops": 2e-9 * tokens * width**2 / taken, "relative_error": error})
    return rows


class WholeModel(StreamedModel):
    """A StreamedModel with embedding, final norm and head, as the quantiser reads them; not rotated."""

    r3_block = r4_block = None

    def embedding(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """On the CPU, where the quantiser keeps the stream."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.config.vocab_size, self.config.hidden_size, generator=generator).to(dtype)

    def final_norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(self.config.hidden_size, dtype=dtype)

    def lm_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.embedding(dtype)

    def chunks(self, name: str, dtype: torch.dtype = torch.float32):
        return self.embedding(dtype).split(8192)


def layer_times(device: str) -> list[dict]:
    """Calibration and GPTQ of 8 layers of Llama-3.1-8B's shape on Q4_0, scaled to its 32; a small vocabulary."""
    hidden, intermediate, layers, heads, kv_heads, windows, length = (
        (4096, 14336, 8, 32, 8, 64, 2048) if device == "cuda" else (64, 128, 2, 4, 2, 4, 16))
    config = ModelConfig("llama", hidden, intermediate, layers, heads, kv_heads, hidden // heads, 1024, 1e-5, 10000.0,
                         4096, tie_word_embeddings=False)
    model = WholeModel(config, device)
    tokens = torch.randint(config.vocab_size, (windows, length), generator=torch.Generator().manual_seed(1))
    types = tensor_types(get_family("llama"), config, Recipe(rotation="none", embedding_type="f16", head_type="f16"))
    options = QuantizerOptions(types, batch_size=4, device=device)
    quantizer = SequentialQuantizer(model, options, tokens)
    ticks = [time.perf_counter()]

    def tick(*_):
        synchronize(device)
        ticks.append(time.perf_counter())

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder) / "checkpoint") as writer:
        quantizer.run(writer, tick)
    taken = [late - early for early, late in zip(ticks, ticks[1:], strict=False)]
    gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    # The first layer also waits for the embedding and for kernels to compile.
    later = sum(taken[1:]) / (layers - 1)
    said = f"{windows} x {length} tokens"
    return [{"what": f"calibration and GPTQ of {layers} layers, {said}", "seconds": sum(taken), "gib": gib},
            {"what": "a layer after the first, mean", "seconds": later, "gib": None},
            {"what": f"scaled from {layers} to {LAYERS_OF_8B} layers, not measured",
             "seconds": taken[0] + (LAYERS_OF_8B - 1) * later, "gib": None}]
