"""Speed of this project's GGUFs in llama.cpp against llama-quantize's of the same types.

    python benchmarks/gguf_speed.py

*Files.* SmolLM2-135M (`testbed.py`) or `--model`, a float GGUF; R1 and R2 fused, rounded to nearest: speed depends on
types, not on codes. Stock files are llama-quantize's, `--pure`, embedding and head q8_0 as in ours; the script stops if
any matrix of the two has another type. (R1 unties the head, so our file holds one matrix more; both runtimes read one
head per token.)

*Times.* Prompts of `--prompt` tokens, then `--decode` tokens one by one; all files in turns, `--turns` times after one
that does not count. A turn's decode time is the median over its tokens. Table: medians over turns in tokens/s; ratio:
median, lowest and highest quartile of ours to stock within a turn. The kernels are the same, so it should be 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
from arms import run_logged
from llama_tools import get_tools
from rich.console import Console
from rich.table import Table
from rotations import save
from testbed import build_testbed

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

FILE_TYPES = {"q2_k": "Q2_K", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S"}
MEASURES = ("prefill_tokens_per_s", "decode_tokens_per_s")


def make_files(options: argparse.Namespace, kind: str, folder: Path) -> dict[str, Path]:
    """Our file and llama-quantize's, of equal types; InputError if they are not."""
    model = options.model or build_testbed(options.work / "testbed")
    paths = {arm: folder / f"{kind}-{arm}.gguf" for arm in ("ours", "stock")}
    pipeline.export(model, paths["ours"], format="gguf", type=kind, embedding_type="q8_0", head_type="q8_0",
                    rotation="hadamard", quantizer="rtn", calibration="none")
    run_logged([get_tools(sdist=options.sdist).quantize, "--pure", "--token-embedding-type", "q8_0",
                "--output-tensor-type", "q8_0", model, paths["stock"], FILE_TYPES.get(kind, kind.upper()), "1"],
               options.work / "llama-quantize.log")
    ours, stock = map(matrix_types, paths.values())
    different = [name for name in stock if ours.get(name) != stock[name]]
    if different or set(ours) - set(stock) - {"output.weight"}:
        raise InputError(f"the two {kind} files differ in the types of {', '.join(different) or 'other matrices'}")
    return paths


def matrix_types(path: Path) -> dict[str, str]:
    """Type of every matrix by name."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}


def measure(options: argparse.Namespace, files: dict[tuple[str, str], Path]) -> dict[tuple[str, str], list[dict]]:
    """Tokens per second of every file in every turn."""
    found = {key: [] for key in files}
    with ExitStack() as stack:
        backends = {key: stack.enter_context(LlamaCppBackend(path, n_threads=options.threads))
                    for key, path in files.items()}
        for turn in range(options.turns + 1):
            for key, backend in backends.items():
                speed = backend.speed(options.prompt, options.decode, repeats=1)
                if turn:
                    found[key].append(speed)
            print(f"turn {turn} of {options.turns}", flush=True)
    return found


def run(options: argparse.Namespace) -> dict:
    """Make the files, time them, and compare."""
    options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="speed-", dir=options.work) as folder:
        files = {(kind, arm): path for kind in options.types
                 for arm, path in make_files(options, kind, Path(folder)).items()}
        found = measure(options, files)
        rows = [{"type": kind, "arm": arm, "bytes": path.stat().st_size, "turns": found[kind, arm],
                 **{name: float(np.median([turn[name] for turn in found[kind, arm]])) for name in MEASURES}}
                for (kind, arm), path in files.items()]
    return {"settings": {name: getattr(options, name) for name in ("prompt", "decode", "turns", "threads", "types")}
            | {"model": options.model.name if options.model else "testbed"},
            "environment": {"platform": platform.platform(), "machine": platform.machine(), "cpus": os.cpu_count(),
                            "llama-cpp-python": metadata.version("llama-cpp-python")},
            "rows": rows, "ours to stock": {kind: {name: quartiles(found, kind, name) for name in MEASURES}
                                            for kind in options.types}}


def quartiles(found: dict, kind: str, name: str) -> dict[str, float]:
    """Of the ratios of ours to stock within a turn."""
    ratios = [ours[name] / stock[name] for ours, stock in zip(found[kind, "ours"], found[kind, "stock"], strict=True)]
    return dict(zip(("low", "median", "high"), map(float, np.quantile(ratios, [0.25, 0.5, 0.75])), strict=True))


def print_table(results: dict) -> None:
    """Tokens per second by type and file."""
    table = Table("type", "file", "MB", "prefill", "decode", "prefill, to stock", "decode, to stock")
    for row in results["rows"]:
        ratios = results["ours to stock"][row["type"]]
        table.add_row(row["type"], row["arm"], f"{row['bytes'] / 1e6:.1f}", *(f"{row[name]:.1f}" for name in MEASURES),
                      *("{median:.3f} ({low:.3f}-{high:.3f})".format(**ratios[name]) if row["arm"] == "ours" else ""
                        for name in MEASURES))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_k"])
    parser.add_argument("--model", type=Path, help="a float GGUF (default: the testbed)")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--sdist", help="llama-cpp-python sdist to build llama-quantize from")
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gguf_speed.json")
    parsed = parser.parse_args()
    try:
        measured = run(parsed)
    except InputError as error:
        sys.exit(f"error: {error}")
    save(parsed.out, measured)
    print_table(measured)
