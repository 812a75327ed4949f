"""Speed in onnxruntime-genai on the CPU: this project's ONNX packages, R4 at every block, and the builder's own.

    python benchmarks/onnx_speed.py

*Models.* SmolLM2-135M (`testbed.py`), and, for fewer arms, random weights of half of Llama-3.2-1B's layers (8 of
2048 × 8192) under SmolLM2's vocabulary. 4 bits in blocks of 32 with zero-points, accuracy level 4, rounded to nearest:
speed depends on types and operators, not on codes.

*Arms.* `none`: ours, its tied matrix in 8 bits; `again`: a second copy, which shows how far equal packages seem apart;
`4bit-head`: all of it in 4 bits; `r4-64` ... `r4-512`: R4 in blocks of so many; `r1r2`: the head read through a matrix.
`builder`: onnxruntime-genai's default method, the embedding in float; `builder-shared`: one 4-bit matrix (k_quant).

*Times.* Where a model's weights come to lie in memory moves its speed by some per cent, so all packages are loaded
afresh `--loads` times in a new order; then each reads a prompt of 64 and all write 64 tokens in turns of eight, of
which the median without the first counts. A ratio is that to `none` within a load; medians and quartiles over loads.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import torch
from onnx_vs_builder import build_peer
from rich.console import Console
from rich.table import Table
from rotations import save
from safetensors.torch import save_file
from testbed import build_testbed

from optrot_edge import pipeline

R4_BLOCKS = (64, 128, 256, 512)
OURS = {"none": {}, "again": {}, "4bit-head": {"head_type": "4bit"}, "r1r2": {"rotation": "hadamard"}} | {
    f"r4-{block}": {"rotation": "hadamard", "rotate": "r4", "r4_block": block} for block in R4_BLOCKS}
PEERS = {"builder": "default", "builder-shared": "k_quant-shared"}
WIDE_ARMS = ("none", "again", "r4-64", "r4-256", "builder")
PROMPT, TURN, TURNS = 64, 8, 8
WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 8, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64}


def float_folder(testbed: Path, folder: Path) -> Path:
    """The testbed as a Hugging Face folder in float32, from which the builder starts."""
    pipeline.export(testbed, folder, format="mlx", type="f32", embedding_type="f32", head_type="f32", dtype="float32",
                    rotation="none", quantizer="rtn", calibration="none")
    return folder


def widen(folder: Path) -> Path:
    """The folder with random float16 weights of the shape WIDE instead of its own."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text()) | WIDE
    (folder / "config.json").write_text(json.dumps(config))
    hidden, ff, kv = WIDE["hidden_size"], WIDE["intermediate_size"], WIDE["num_key_value_heads"] * WIDE["head_dim"]
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
              "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ff, hidden), "mlp.up_proj": (ff, hidden),
              "mlp.down_proj": (hidden, ff), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    names = {"model.embed_tokens": (config["vocab_size"], hidden), "model.norm": (hidden,)} | {
        f"model.layers.{layer}.{name}": shape for layer in range(WIDE["num_hidden_layers"])
        for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    save_file({f"{name}.weight": torch.ones(shape, dtype=torch.float16) if len(shape) == 1 else
               (torch.randn(shape, generator=generator) * shape[1] ** -0.5).half() for name, shape in names.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def measure(name: str, source: Path, arms: tuple[str, ...], work: Path, loads: int) -> list[dict]:
    """Rows of one model: bytes, milliseconds per token, and ratios to `none`."""
    with tempfile.TemporaryDirectory(prefix="packages-", dir=work) as folder:
        packages = {arm: Path(folder) / arm for arm in arms}
        for arm, out in packages.items():
            if arm in PEERS:
                build_peer(PEERS[arm], 32, "zero", source, out, work)
            else:
                pipeline.export(source, out, format="onnx", group_size=32, quantizer="rtn", calibration="none",
                                accuracy_level=4, **({"rotation": "none"} | OURS[arm]))
        order = np.random.default_rng(0)
        found = [one_load({arm: packages[arm] for arm in order.permutation(list(packages))}) for _ in range(loads)]
        sizes = {arm: sum(path.stat().st_size for path in packages[arm].rglob("*.onnx*")) for arm in packages}
    rows = []
    for arm, size in sizes.items():
        row = {"model": name, "arm": arm, "bytes": size}
        for kind in ("prompt", "token"):
            low, ratio, high = np.quantile([load[arm][kind] / load["none"][kind] for load in found], [0.25, 0.5, 0.75])
            row[kind] = {"ms": float(np.median([load[arm][kind] for load in found])), "to none": float(ratio),
                         "low": float(low), "high": float(high)}
        rows.append(row)
    return rows


def one_load(packages: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Milliseconds of the prompt and of a token of packages that are loaded together."""
    models = {arm: genai.Model(str(path)) for arm, path in packages.items()}
    running, prompts = {}, {}
    for arm, model in models.items():
        for _ in range(2):  # the first takes the memory
            running[arm], prompts[arm] = start(model)
    times: dict[str, list[float]] = {arm: [] for arm in packages}
    for _ in range(TURNS):
        for arm, generator in running.items():
            time.sleep(0.005)  # the threads of the one before spin a while
            turn = []
            for _ in range(TURN):
                begin = time.perf_counter()
                generator.generate_next_token()
                turn.append(1e3 * (time.perf_counter() - begin))
            times[arm].append(float(np.median(turn[1:])))
    return {arm: {"prompt": prompts[arm], "token": float(np.median(found))} for arm, found in times.items()}


def start(model: genai.Model) -> tuple[genai.Generator, float]:
    """Greedy generation after the prompt, which no end token ends, and the prompt's milliseconds."""
    params, length = genai.GeneratorParams(model), PROMPT + TURN * TURNS + 1
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator, begin = genai.Generator(model, params), time.perf_counter()
    generator.append_tokens(np.arange(100, 100 + PROMPT, dtype=np.int32))
    generator.generate_next_token()
    return generator, 1e3 * (time.perf_counter() - begin)


def print_table(results: dict) -> None:
    """Megabytes, tokens per second and ratios of time."""
    table = Table("model", "arm", "MB", "tokens/s", "a token, to none", "a prompt, to none")
    for row in results["rows"]:
        table.add_row(row["model"], row["arm"], f"{row['bytes'] / 1e6:.1f}", f"{1e3 / row['token']['ms']:.1f}",
                      *(f"{row[kind]['to none']:.3f} ({row[kind]['low']:.3f}-{row[kind]['high']:.3f})"
                        for kind in ("token", "prompt")))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=12, help="of SmolLM2; half as many of the other (12)")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="model and packages (out/bench)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_speed.json")
    given = parser.parse_args()
    testbed = build_testbed(given.work / "testbed")
    results = {"settings": {"loads": given.loads, "prompt": PROMPT, "tokens": TURN * TURNS,
                            "processor": platform.processor() or platform.machine()},
               "versions": {name: metadata.version(name) for name in ("onnxruntime", "onnxruntime-genai")}, "rows": []}
    with tempfile.TemporaryDirectory(prefix="float-", dir=given.work) as scratch:
        source = float_folder(testbed, Path(scratch) / "model")
        results["rows"] += measure("SmolLM2-135M", source, (*OURS, *PEERS), given.work, given.loads)
        print_table(results)
        results["rows"] += measure("2048 × 8192, 8 layers", widen(source), WIDE_ARMS, given.work, given.loads // 2)
    save(given.out, results)
    print_table(results)
