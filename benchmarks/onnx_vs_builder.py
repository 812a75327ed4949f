"""KL and bytes of ONNX packages at equal bits and blocks: this project's against onnxruntime-genai's builder.

    python benchmarks/onnx_vs_builder.py --text wiki.test.raw

*Model, text, score.* As in `rotations.py`: the dithered SmolLM2-135M, 96 × 256 calibration tokens, 32 × 256 evaluation
tokens; KL(float ‖ package) in nats, by onnxruntime on the CPU, `MatMulNBits` with float activations (accuracy level
0); `level4` is the same graph with int8 activations, on the first `--level4-windows`. Speed is in `onnx_speed.py`.

*Arms.* `builder-default`, `builder-rtn`, `builder-k_quant`: the builder's own int4 methods on the float model; it keeps
the embedding in float32 beside a quantised head. `-shared` after a name shares one int4 matrix between the two.
`ours+none`, `ours+plus-r2`, `ours+hadamard`, `ours+optrot`, `ours+auto`: GPTQ, its tied matrix in 8 bits, or in 4 bits
with `-4bit` after a name; `+r4` rotates online before `down_proj` besides. `sym` and `zero` are grids without and with
zero-points.

What the builder fails at is a row with its error. Ratios carry a paired bootstrap 95 % interval over windows. Arms
are written to `--out` as they are done; a second run continues and refuses other settings.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from package_bench import PackageBench, measure_missing
from rich.console import Console
from rich.table import Table
from rotations import ARMS as ROTATIONS
from rotations import arguments
from scoring import bootstrap_ratio, standard_error

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.runtime.onnx import OnnxBackend

METHODS = ("default", "rtn", "k_quant")
BUILDERS = [f"builder-{method}" for method in METHODS]
OURS = {f"ours+{name}": fields for name, fields in (*ROTATIONS.items(), ("auto", {"rotation": "auto"}))}
ARMS = [*BUILDERS, "builder-k_quant-shared", "ours+none", "ours+none-4bit", "ours+plus-r2", "ours+hadamard",
        "ours+optrot", "ours+none+r4", "ours+optrot+r4"]


class PeerError(RuntimeError):
    """The builder cannot make this package."""


def build_peer(method: str, block: int, grid: str, source: Path, out: Path, work: Path) -> None:
    """onnxruntime-genai's own builder: the folder `source` to `out` by one of METHODS, or that and "-shared".

    Raises PeerError when it fails.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    shared, method = method.endswith("-shared"), method.removesuffix("-shared")
    extra = [f"algo_config={method}", f"block_size={block}", f"is_symmetric={str(grid == 'sym').lower()}",
             "accuracy_level=4", f"shared_embeddings={str(shared).lower()}",
             *(["op_types_to_quantize=MatMul/Gather"] * shared)]
    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory(dir=work) as cache, contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):
        arguments = ("", str(source), str(out), "int4", "cpu", cache)
        extra = parse_extra_options(*arguments, extra)
        try:
            create_model(*arguments, **extra)
        except Exception as error:  # whatever a method of its runs into
            raise PeerError(f"{type(error).__name__}: {error}") from error


class Bench(PackageBench):
    """Packages and scores of one run."""

    def make(self, arm: str, block: int, grid: str) -> Path:
        """The arm's package, made once."""
        out = Path(self.folder.name) / f"{arm}-{block}-{grid}"
        if out.exists():
            return out
        if arm.startswith("builder-"):
            build_peer(arm.removeprefix("builder-"), block, grid, self.float_folder(), out, self.work)
            return out
        options, name = self.options, arm.removesuffix("+r4").removesuffix("-4bit")
        if name not in OURS:
            raise InputError(f"unknown arm {arm}; use {', '.join([*BUILDERS, *OURS])}, -shared, -4bit or +r4 after one")
        fields = dict(OURS[name])
        if arm.endswith("+r4"):
            fields = {"rotation": fields["rotation"].replace("none", "hadamard"),
                      "rotate": "r4" if fields["rotation"] == "none" else f"{fields.get('rotate', 'r1,r2')},r4"}
        windows = options.nsamples * 8 // 9 if fields["rotation"] == "auto" else options.nsamples  # it holds out more
        pipeline.export(self.model, out, format="onnx", group_size=block, symmetric=grid == "sym",
                        head_type="4bit" if "-4bit" in arm else None, calibration=str(self.calibration),
                        nsamples=windows, seqlen=options.seqlen, accuracy_level=4, **fields)
        return out

    def measure(self, arm: str, block: int, grid: str) -> dict:
        """One row of the results."""
        started = time.perf_counter()
        try:
            package = self.make(arm, block, grid)
        except PeerError as error:
            return {"arm": arm, "block": block, "grid": grid, "bytes": None, "kl": None, "failed": str(error)}
        made, windows = time.perf_counter(), self.reference.windows
        rows = {}
        for level, count in ((0, len(windows)), (4, self.options.level4_windows)):
            with OnnxBackend(package, accuracy_level=level) as backend:
                rows[level] = self.reference.score(map(torch.from_numpy, backend.iter_logits(windows[:count])))
        size = sum(path.stat().st_size for path in package.rglob("*.onnx*"))
        return {"arm": arm, "block": block, "grid": grid, "bytes": size, **rows[0],
                "kl_standard_error": standard_error(rows[0]["kl_windows"]), "level4": rows[4],
                "seconds": round(made - started, 1)}


def ratios(rows: list[dict]) -> dict:
    """By block and grid, arm: bytes, KL, and its ratio to the builder's best of the same block, either grid, and
    of ours to the same not rotated."""
    rows = [row for row in rows if row["kl"] is not None]
    best = {block: min((row for row in rows if row["block"] == block and row["arm"] in BUILDERS),
                       key=lambda row: row["kl"], default=None) for block in {row["block"] for row in rows}}
    plain = {(row["block"], row["grid"]): row for row in rows if row["arm"] == "ours+none"}
    found: dict = {}
    for row in rows:
        entry = {"bytes": row["bytes"], "kl": row["kl"], "kl_level4": row["level4"]["kl"], "top1": row["top1"]}
        peers = {"to the builder's best": best[row["block"]]}
        if row["arm"].startswith("ours+"):
            peers["to ours, not rotated"] = plain.get((row["block"], row["grid"]))
        entry |= {name: bootstrap_ratio(np.array([row["kl_windows"]]), np.array(peer["kl_windows"]))
                  for name, peer in peers.items() if peer is not None}
        found.setdefault(f"{row['block']} {row['grid']}", {})[row["arm"]] = entry
    return found


def run(options: argparse.Namespace) -> dict:
    """Measure what is missing; InputError if `--out` holds other settings."""
    bench = Bench(options, level4_windows=options.level4_windows)
    return measure_missing(bench, ("arm", "block", "grid"),
                           itertools.product(options.arms, options.blocks, options.grids),
                           ("onnxruntime", "onnxruntime-genai"), ratios)


def print_table(results: dict) -> None:
    """Sizes, KL and ratios, best last."""
    table = Table("block, grid", "arm", "MB", "KL", "level 4", "top-1", "to builder's best (95 %)")
    for case, arms in sorted(results["ratios"].items()):
        for arm, entry in sorted(arms.items(), key=lambda item: -item[1]["kl"]):
            ratio = entry.get("to the builder's best")
            table.add_row(case, arm, f"{entry['bytes'] / 1e6:.1f}", f"{entry['kl']:.4f}", f"{entry['kl_level4']:.4f}",
                          f"{entry['top1']:.1%}",
                          f"{ratio['ratio']:.3f} ({ratio['low']:.3f}-{ratio['high']:.3f})" if ratio else "")
            case = ""
    for row in results["rows"]:
        if "failed" in row:
            table.add_row(f"{row['block']} {row['grid']}", row["arm"], "", row["failed"])
    Console(width=None if sys.stdout.isatty() else 140).print(table)


if __name__ == "__main__":
    parser = arguments(__doc__.splitlines()[0], "onnx_vs_builder")
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--blocks", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--grids", nargs="+", choices=["sym", "zero"], default=["sym", "zero"])
    parser.add_argument("--level4-windows", type=int, default=8)
    try:
        print_table(run(parser.parse_args()))
    except InputError as error:
        sys.exit(f"error: {error}")
