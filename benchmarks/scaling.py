"""What a layer costs to quantise, measured at small sizes on one CPU thread, and the plan that follows for 70B.

    python benchmarks/scaling.py

Layers of Llama-3-70B's proportions (d_ff = 3.5 hidden, an eighth as many KV heads) with random weights and tokens go
through `SequentialQuantizer`, whole: both streams, asymmetric calibration, GPTQ with refits, Q4_0. Two layers are timed
and the second counts. Operations are counted by the formulas of docs/scaling.md; a rate for forward passes and moments
and another for the rest are fitted to the times by least squares. Seconds are processor seconds of one thread. The
70B plan is arithmetic on the formulas and on assumed GPU rates, which are printed with it: no GPU is measured. Writes
results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from gpu_check import print_table

from optrot_edge.checkpoint import CheckpointWriter
from optrot_edge.memory import working_set
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import get_family
from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
from optrot_edge.recipe import Recipe
from optrot_edge.tensor_types import tensor_types

RESULTS = Path(__file__).parent / "results" / "scaling.json"
SIZES = (256, 384, 512)
WINDOWS, LENGTH = 16, 128
REFITS = 2
GPU = {"float32 Tflop/s": 40.0, "float64 Tflop/s": 20.0, "GB/s from disk": 2.0}  # assumed


def shaped(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> ModelConfig:
    """A Llama of that shape."""
    return ModelConfig("llama", hidden, intermediate, layers, heads, kv_heads, hidden // heads, vocab, 1e-5, 500000.0,
                       8192, tie_word_embeddings=False)


LLAMA_70B = shaped(8192, 28672, 80, 64, 8, 128256)


class RandomModel:
    """Weights drawn when asked for; what `SequentialQuantizer` asks of a model."""

    r3_block = r4_block = None

    def __init__(self, config: ModelConfig):
        self.config = config

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        generator, config = torch.Generator().manual_seed(index), self.config
        hidden, ff, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
        shapes = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden),
                  "o_proj": (hidden, hidden), "gate_proj": (ff, hidden), "up_proj": (ff, hidden),
                  "down_proj": (hidden, ff)}
        found = {f"{name}.weight": torch.randn(shape, generator=generator, dtype=dtype) * shape[1] ** -0.5
                 for name, shape in shapes.items()}
        return found | {f"{norm}.weight": torch.ones(hidden, dtype=dtype) for norm in ("attn_norm", "mlp_norm")}

    def chunks(self, name: str, dtype: torch.dtype = torch.float32):
        yield torch.randn(self.config.vocab_size, self.config.hidden_size, generator=torch.Generator().manual_seed(1),
                          dtype=dtype)

    def final_norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(self.config.hidden_size, dtype=dtype)


def operations(config: ModelConfig, tokens: int, length: int, refits: int = REFITS) -> dict[str, float]:
    """Floating-point operations of one layer, by the formulas of docs/scaling.md."""
    hidden, ff = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    stages = [(q_rows + 2 * kv_rows, hidden), (hidden, q_rows), (2 * ff, hidden), (hidden, ff)]  # (rows, inputs)
    weights = sum(rows * width for rows, width in stages)
    squares = sum(width**2 for _, width in stages)
    return {"forward": 2 * 2 * tokens * (weights + length * q_rows),
            "moments": 2 * tokens * (2 * squares + hidden * (q_rows + ff)),
            "factors": sum(8 * width**3 for _, width in stages),
            "columns": sum((1 + refits) * 2 * rows * width**2 for rows, width in stages),
            "corrections": sum(8 * rows * width**2 for rows, width in stages)}


def measure(hidden: int, folder: Path) -> dict:
    """Seconds of one layer, and its operations."""
    config = shaped(hidden, 7 * hidden // 2, 2, 8, 1, 256)
    tokens = torch.randint(256, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    types = tensor_types(get_family("llama"), config, Recipe(rotation="none", embedding_type="f16", head_type="f16"))
    options = QuantizerOptions(types, asymmetric="residual", refits=REFITS)
    ticks = []
    with CheckpointWriter(folder / str(hidden)) as writer:
        SequentialQuantizer(RandomModel(config), options, tokens).run(
            writer, lambda *_: ticks.append(time.process_time()))
    counted = operations(config, tokens.numel(), LENGTH)
    return {"hidden": hidden, "d_ff": config.intermediate_size, "seconds": ticks[1] - ticks[0],
            "streaming Gflop": (counted["forward"] + counted["moments"]) / 1e9,
            "solving Gflop": (counted["factors"] + counted["columns"] + counted["corrections"]) / 1e9}


def fitted_rates(rows: list[dict]) -> dict[str, float]:
    """Gflop/s of streaming and of solving that explain the seconds best; the relative error left in the worst row."""
    counts = torch.tensor([[row["streaming Gflop"], row["solving Gflop"]] for row in rows], dtype=torch.float64)
    seconds = torch.tensor([row["seconds"] for row in rows], dtype=torch.float64)
    scaled = counts / seconds[:, None]
    inverse = torch.linalg.lstsq(scaled, torch.ones_like(seconds)[:, None]).solution[:, 0]
    if not bool((inverse > 0).all()):  # one of the two hides behind the other: a common rate
        inverse = torch.full_like(inverse, float(seconds.sum() / counts.sum()))
    return {"streaming Gflop/s": float(1 / inverse[0]), "solving Gflop/s": float(1 / inverse[1]),
            "worst relative error": float((scaled @ inverse - 1).abs().max())}


def plan_70b(rates: dict[str, float], nsamples: int = 128, length: int = 2048) -> dict:
    """The 70B plan: per layer and in all; hours on this CPU's rates, and on assumed rates of one and eight GPUs."""
    config, tokens = LLAMA_70B, nsamples * length
    counted = operations(config, tokens, length)
    streaming, solving = counted["forward"] + counted["moments"], sum(
        counted[name] for name in ("factors", "columns", "corrections"))
    hidden, ff = config.hidden_size, config.intermediate_size
    weights = hidden * (2 * hidden + 2 * 1024 + 3 * ff)
    reading = 2 * weights / (GPU["GB/s from disk"] * 1e9)
    one = streaming / (GPU["float32 Tflop/s"] * 1e12) + solving / (GPU["float64 Tflop/s"] * 1e12) + reading
    # windows are shared out for the streaming, rows of a matrix for columns and corrections; factors are not shared
    shared = (streaming / (GPU["float32 Tflop/s"] * 1e12)
              + (solving - counted["factors"]) / (GPU["float64 Tflop/s"] * 1e12)) / 8
    eight = shared + counted["factors"] / (GPU["float64 Tflop/s"] * 1e12) + reading
    cpu = streaming / (rates["streaming Gflop/s"] * 1e9) + solving / (rates["solving Gflop/s"] * 1e9)
    memory = {kind: working_set(config, Recipe(rotation="hadamard", nsamples=nsamples, seqlen=length, asymmetric=kind))
              for kind in ("residual", "none")}
    matrices = 2 * config.vocab_size * hidden
    return {"tokens": tokens, "weights per layer": weights,
            "Tflop per layer": {name: count / 1e12 for name, count in counted.items()},
            "seconds per layer, assumed GPU": {"reading": reading, "1 GPU": one, "8 GPUs": eight},
            "hours, 80 layers": {"this CPU, one thread": 80 * cpu / 3600, "1 GPU": 80 * one / 3600,
                                 "8 GPUs": 80 * eight / 3600},
            "working set GiB": {kind: {part: size / 2**30 for part, size in parts.items()} | {
                "sum": sum(parts.values()) / 2**30} for kind, parts in memory.items()},
            "disk GB": {"model, bfloat16": 2 * (80 * weights + matrices) / 1e9,
                        "two streams": 2 * 4 * tokens * hidden / 1e9,
                        "checkpoint, a byte per weight and fp16 scales": (80 * weights + matrices) * (1 + 2 / 32) / 1e9,
                        "GGUF, Q4_0 with Q8_0 head": (4.5 * (80 * weights + matrices / 2) + 8.5 * matrices / 2) / 8e9,
                        "covariances, OptRot+ only": 80 * 4 * (3 * hidden**2 + ff**2) / 1e9}}


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(hidden, Path(folder)) for hidden in SIZES]
    rates = fitted_rates(rows)
    results = {"threads": 1, "tokens": WINDOWS * LENGTH, "refits": REFITS, "rows": rows, "rates": rates,
               "assumed": GPU, "70B": plan_70b(rates)}
    print_table(rows)
    print(json.dumps({"rates": rates, "assumed": GPU, "70B": results["70B"]}, indent=1))
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
