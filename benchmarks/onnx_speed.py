"""Speed in onnxruntime-genai on the CPU: this project's ONNX packages, R4 at every block, and the builder's own.

    python benchmarks/onnx_speed.py

*Model.* SmolLM2-135M (`testbed.py`), 4 bits in blocks of 32 with zero-points, accuracy level 4, rounded to nearest:
speed depends on types and operators, not on codes.

*Arms.* `none`: ours, its tied matrix in 8 bits; `again`: a second copy, which shows how far equal packages seem apart;
`4bit-head`: all of it in 4 bits; `r4-64` ... `r4-512`: R4 in blocks of so many; `r1r2`: the head read through a matrix.
`builder`: onnxruntime-genai's default method, the embedding in float; `builder-shared`: one 4-bit matrix (k_quant).

*Times.* Where a model's weights come to lie in memory moves its speed by some per cent, so all packages are loaded
afresh `--loads` times in a new order; then each reads a prompt of 64, five times, and all write 64 tokens in turns of
eight, of which the median without the first counts. The fastest prompt and turn of a load stand for it, as what else
the machine does only ever adds. A ratio is that to the mean of `none` and `again` within a load; medians and quartiles
over loads.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from onnx_vs_builder import build_peer
from package_bench import float_folder
from rich.console import Console
from rich.table import Table
from rotations import save
from testbed import build_testbed

from optrot_edge import pipeline

R4_BLOCKS = (64, 128, 256, 512)
OURS = {"none": {}, "again": {}, "4bit-head": {"head_type": "4bit"}, "r1r2": {"rotation": "hadamard"}} | {
    f"r4-{block}": {"rotation": "hadamard", "rotate": "r4", "r4_block": block} for block in R4_BLOCKS}
PEERS = {"builder": "default", "builder-shared": "k_quant-shared"}
PROMPT, PROMPTS, TURN, TURNS = 64, 5, 8, 8


def measure(source: Path, work: Path, loads: int) -> list[dict]:
    """Rows: bytes, milliseconds of the prompt and of a token, and their ratios."""
    with tempfile.TemporaryDirectory(prefix="packages-", dir=work) as folder:
        packages = {arm: Path(folder) / arm for arm in (*OURS, *PEERS)}
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
        row = {"arm": arm, "bytes": size}
        for kind in ("prompt", "token"):
            low, ratio, high = np.quantile([2 * load[arm][kind] / (load["none"][kind] + load["again"][kind])
                                            for load in found], [0.25, 0.5, 0.75])
            row[kind] = {"ms": float(np.median([load[arm][kind] for load in found])), "ratio": float(ratio),
                         "low": float(low), "high": float(high)}
        rows.append(row)
    return rows


def one_load(packages: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Milliseconds of the prompt and of a token of packages that are loaded together."""
    models = {arm: genai.Model(str(path)) for arm, path in packages.items()}
    running, prompts, tokens = {}, {arm: [] for arm in packages}, {arm: [] for arm in packages}
    for _ in range(PROMPTS):
        for arm, model in models.items():
            time.sleep(0.005)  # the threads of the one before spin a while
            running[arm], spent = start(model)
            prompts[arm].append(spent)
    for _ in range(TURNS):
        for arm, generator in running.items():
            time.sleep(0.005)
            turn = []
            for _ in range(TURN):
                begin = time.perf_counter()
                generator.generate_next_token()
                turn.append(1e3 * (time.perf_counter() - begin))
            tokens[arm].append(float(np.median(turn[1:])))
    return {arm: {"prompt": min(prompts[arm]), "token": min(tokens[arm])} for arm in packages}


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
    table = Table("arm", "MB", "tokens/s", "time of a token", "of a prompt")
    for row in results["rows"]:
        table.add_row(row["arm"], f"{row['bytes'] / 1e6:.1f}", f"{1e3 / row['token']['ms']:.1f}",
                      *(f"{row[kind]['ratio']:.3f} ({row[kind]['low']:.3f}-{row[kind]['high']:.3f})"
                        for kind in ("token", "prompt")))
    Console().print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="model and packages (out/bench)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_speed.json")
    given = parser.parse_args()
    testbed = build_testbed(given.work / "testbed")
    with tempfile.TemporaryDirectory(prefix="float-", dir=given.work) as scratch:
        rows = measure(float_folder(testbed, Path(scratch) / "model"), given.work, given.loads)
    results = {"settings": {"loads": given.loads, "prompt": PROMPT, "tokens": TURN * TURNS,
                            "processor": platform.processor() or platform.machine()},
               "versions": {name: metadata.version(name) for name in ("onnxruntime", "onnxruntime-genai")},
               "rows": rows}
    save(given.out, results)
    print_table(results)
