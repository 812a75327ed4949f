"""Bits where they matter: this project's files against llama-quantize's mixes at equal file bytes.

    python benchmarks/equal_bytes.py --text wiki.test.raw

*Model, text, score.* As in `gguf_vs_llama_quantize.py`: the dithered SmolLM2-135M, 96 × 256 calibration tokens for
both sides, 32 × 256 evaluation tokens; KL(float ‖ file) in nats from the dequantised weights in torch and in real
llama.cpp. Files are whole: embedding and head are quantised too.

*Arms*, for each of llama-quantize's file types. `stock`: llama-quantize with the imatrix, its default recipe. `mix`:
the same types, by this project's quantiser. `target`: `--target-size` with the bytes of the stock file, never more,
without rotation. `target+plus-r2`: after OptRot+ of R2 and channel scales, which leaves the embedding tied.

Ratios to `stock` carry a paired bootstrap 95 % interval over windows. Arms are written to `--out` as they are done; a
second run continues and refuses other settings. Needs cmake and a C++ compiler once (`llama_tools.py`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
from arms import Arm, Bench, run_logged
from rich.console import Console
from rich.table import Table
from rotations import ARMS as ROTATIONS
from rotations import arguments, save
from scoring import bootstrap_ratio, llama_logits, standard_error, torch_logits

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.rotating import versions

TYPES = ("q4_k_m", "iq4_xs", "q3_k_m", "q5_k_m")
ARMS = ("stock", "mix", "target", "target+plus-r2")


def make(bench: Bench, kind: str, arm: str, folder: Path, size: int | None) -> tuple[Path, dict]:
    """The arm's file, and what its checkpoint says of it; `size` is the stock file's."""
    out, options = folder / "model.gguf", bench.options
    if arm == "stock":
        run_logged([bench.tools.quantize, "--imatrix", bench.imatrix(Arm(kind, "stock")), bench.model, out,
                    kind.upper(), str(options.threads)], bench.work / "llama-quantize.log")
        return out, {}
    name, _, rotation = arm.partition("+")
    fields = {"type": kind} if name == "mix" else {"target_size": size}
    pipeline.export(bench.model, out, checkpoint=folder / "checkpoint", calibration=str(bench.calibration),
                    nsamples=options.nsamples, seqlen=options.seqlen, **fields, **ROTATIONS[rotation or "none"])
    return out, {"expected_kl": json.loads((folder / "checkpoint" / "optrot.json").read_text())["expected_kl"]}


def measure(bench: Bench, kind: str, arm: str, size: int | None) -> dict:
    """One row of the results."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="equal-", dir=bench.work) as folder:
        path, about = make(bench, kind, arm, Path(folder), size)
        made = time.perf_counter()
        if size is not None and arm.startswith("target") and path.stat().st_size > size:
            raise RuntimeError(f"{arm} takes {path.stat().st_size:,} bytes and stock {size:,}")
        types: dict[str, int] = {}
        for tensor in gguf.GGUFReader(path).tensors:
            types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
        return {"type": kind, "arm": arm, "bytes": path.stat().st_size, "weights_by_type": types, **about,
                "torch": bench.reference.score(torch_logits(path, bench.windows)),
                "llama": bench.reference.score(llama_logits(path, bench.windows, bench.options.threads)),
                "seconds": round(made - started, 1)}


def ratios(rows: list[dict]) -> dict:
    """Per file type and arm: bytes, KL, and its ratio to stock."""
    found: dict = {}
    for row in rows:
        base = next(r for r in rows if (r["type"], r["arm"]) == (row["type"], "stock"))
        entry = {"bytes": row["bytes"], "kl": row["torch"]["kl"], "kl_llama": row["llama"]["kl"],
                 "kl_standard_error": standard_error(row["torch"]["kl_windows"]), "top1": row["torch"]["top1"]}
        if row is not base:
            entry |= bootstrap_ratio(np.array([row["torch"]["kl_windows"]]), np.array(base["torch"]["kl_windows"]))
            entry["ratio_llama"] = row["llama"]["kl"] / base["llama"]["kl"]
        found.setdefault(row["type"], {})[row["arm"]] = entry
    return found


def run(options: argparse.Namespace) -> dict:
    """Measure what is missing; InputError if `--out` holds other settings."""
    bench = Bench(options)
    results = json.loads(options.out.read_text()) if options.out.exists() else {
        "settings": bench.settings, "versions": versions(), "rows": []}
    if results["settings"] != bench.settings:
        raise InputError(f"{options.out} was measured with other settings; choose another --out or remove it")
    for arm in options.arms:  # the same arm for every type first: one arm's rows compare early
        for kind in options.types:
            sizes = {row["arm"]: row["bytes"] for row in results["rows"] if row["type"] == kind}
            if arm in sizes:
                continue
            results["rows"].append(measure(bench, kind, arm, sizes.get("stock")))
            results["ratios"] = ratios(results["rows"])
            save(options.out, results)
            print(kind, arm, json.dumps(results["ratios"][kind][arm]), flush=True)
    return results


def print_table(results: dict) -> None:
    """Sizes, KL and ratios."""
    table = Table("file type", "arm", "MB", "KL", "in llama.cpp", "to stock (95 %)", "in llama.cpp")
    for kind, arms in results["ratios"].items():
        for arm, entry in arms.items():
            ratio = f"{entry['ratio']:.3f} ({entry['low']:.3f}-{entry['high']:.3f})" if "ratio" in entry else ""
            table.add_row(kind, arm, f"{entry['bytes'] / 1e6:.2f}", f"{entry['kl']:.4f}", f"{entry['kl_llama']:.4f}",
                          ratio, f"{entry['ratio_llama']:.3f}" if ratio else "")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0], "equal_bytes")
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--sdist", help="llama-cpp-python sdist to build the tools from")
    parser.set_defaults(recipe={}, testbed_seed=0)
    try:
        print_table(run(parser.parse_args()))
    except InputError as error:
        sys.exit(f"error: {error}")
