"""What a rotation is worth after GPTQ, on the grids that formats store: KL of every arm, in one frame.

    python benchmarks/rotations.py --text wiki.test.raw

*Model and text.* The dithered SmolLM2-135M testbed (`testbed.py`), and its permuted control; 96 × 256
calibration tokens and 32 × 256 evaluation tokens of disjoint parts of one text (`texts.py`). Embedding and
head stay F16 in every arm. KL(float ‖ arm) in nats over the full vocabulary, decoded weights in torch, float32.

*Grids.* q4_0 and q4_1 are GGUF's (symmetric and asymmetric, groups of 32), int4-g64-min is MLX's default and
int4-g64-sym one of ONNX's.

*Arms.* Plain GPTQ after each (`quantizer_ablation.py` has the rest of the quantiser). `none`: the model as it is.
`hadamard`, `optrot`: random Hadamard R1 and R2, and OptRot from there. `plus`: OptRot+ from the native model, R1, R2
and channel scales; `plus-r2` the same without R1, which leaves the embedding tied; `plus-hadamard`: OptRot+ from the
random Hadamard; `plus-no-scales` and `plus-scales-only` are its ablations. `-permuted` after a name takes the control
model.

Ratios to `none` carry a paired bootstrap 95 % interval over evaluation windows. The result of every arm is
written to `--out` at once; a second run continues and refuses other settings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scoring import Reference, bootstrap_ratio, standard_error
from testbed import build_testbed, sha256
from texts import calibration_text, evaluation_windows, load_text

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.inputs import CalibrationInputs
from optrot_edge.models import open_model
from optrot_edge.models.forward import final_hidden
from optrot_edge.recipe import Recipe
from optrot_edge.rotating import make_rotation, versions
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.runtime.llama_cpp import LlamaCppBackend

GRIDS = ("q4_1", "q4_0", "int4-g64-min", "int4-g64-sym")
ARMS = {
    "none": {"rotation": "none"},
    "hadamard": {"rotation": "hadamard"},
    "optrot": {"rotation": "optrot"},
    "plus": {"rotation": "optrot+"},
    "plus-r2": {"rotation": "optrot+", "rotate": "r2"},
    "plus-hadamard": {"rotation": "optrot+", "plus_start": "hadamard"},
    "plus-no-scales": {"rotation": "optrot+", "scales": False},
    "plus-scales-only": {"rotation": "optrot+", "rotate": ""},
}
console = Console(width=None if sys.stdout.isatty() else 140)


class Bench:
    """Models, texts and scores of one run."""

    def __init__(self, options: argparse.Namespace):
        torch.set_num_threads(options.threads)
        self.options, self.work = options, options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.folder = tempfile.TemporaryDirectory(prefix="rotations-", dir=self.work)
        model, text = self.model(permuted=False), load_text(options.text)
        with LlamaCppBackend(model, vocab_only=True) as backend:
            windows = evaluation_windows(backend, text.evaluation, options.windows, options.seqlen)
            words = calibration_text(backend, text.calibration, options.nsamples, options.seqlen)
        self.calibration = Path(self.folder.name) / "calibration.txt"
        self.calibration.write_text(words, encoding="utf-8")
        self.reference, self.inputs = Reference(model, windows, self.work), {}
        self.settings = {"testbed": model.name, "testbed_sha256": sha256(model), "text": text.source,
                         "text_sha256": text.sha256, "windows": options.windows, "seqlen": options.seqlen,
                         "nsamples": options.nsamples}

    def model(self, *, permuted: bool) -> Path:
        """The testbed, or its control."""
        return build_testbed(self.work / "testbed", permuted=permuted)

    def recipe(self, grid: str, arm: str, seed: int) -> Recipe:
        """What the arm stands for."""
        return Recipe(type=grid, embedding_type="f16", head_type="f16", calibration=str(self.calibration), seed=seed,
                      nsamples=self.options.nsamples, seqlen=self.options.seqlen,
                      asymmetric="none", refits=0, **ARMS[arm.removesuffix("-permuted")])

    def measure(self, grid: str, arm: str, seed: int) -> dict:
        """Make the arm's checkpoint and score it."""
        recipe, permuted, started = self.recipe(grid, arm, seed), arm.endswith("-permuted"), time.perf_counter()
        source = open_model(self.model(permuted=permuted))
        rotation = make_rotation(source, recipe, inputs=self.calibration_inputs(source, recipe, permuted))
        learned = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            fields = {k: v for k, v in vars(recipe).items() if k not in ("rotation", "rotate")}
            path = pipeline.quantize(source.path, Path(folder) / "checkpoint", rotation=rotation, **fields)
            made = time.perf_counter()
            decoded = DecodedCheckpoint(path)
            score = self.reference.score(self._logits(decoded))
            tied = decoded.config.tie_word_embeddings
        return {"grid": grid, "arm": arm, "seed": seed, "tied": tied, **score,
                "kl_standard_error": standard_error(score["kl_windows"]),
                "loss_ratio": rotation.recipe.get("loss", 1) / rotation.recipe.get("loss_start", 1),
                "kind_loss_ratio": rotation.recipe.get("kind_loss_ratio"),
                "seconds": {"rotation": round(learned - started, 1), "quantise": round(made - learned, 1)}}

    def calibration_inputs(self, source, recipe: Recipe, permuted: bool) -> CalibrationInputs:
        """Covariances once per model, sensitivities once per model and grid."""
        shared = next((held for (_, other), held in self.inputs.items() if other == permuted), None)
        key = recipe.type, permuted
        if key not in self.inputs:
            known = None if shared is None else shared.covariances
            self.inputs[key] = CalibrationInputs(source, recipe, "cpu", self.folder.name, covariances=known)
        return self.inputs[key]

    def _logits(self, model):
        hidden = final_hidden(model, torch.from_numpy(self.reference.windows))
        head = model.lm_head(torch.float32)
        head = model.embedding(torch.float32) if head is None else head
        return (F.linear(window, head) for window in hidden)


def ratios(rows: list[dict]) -> dict:
    """Per grid and arm: KL over its seeds and ratio to `none` (of the same model) with a 95 % interval."""
    found = {}
    for grid in dict.fromkeys(row["grid"] for row in rows):
        for arm in dict.fromkeys(row["arm"] for row in rows if row["grid"] == grid):
            mine = np.array([r["kl_windows"] for r in rows if r["grid"] == grid and r["arm"] == arm])
            entry = {"kl": float(mine.mean()), "seeds": len(mine)}
            for name in {"none", "none-permuted" if arm.endswith("-permuted") else "none"}:
                base = [r["kl_windows"] for r in rows if r["grid"] == grid and r["arm"] == name]
                if base and name != arm:
                    entry[f"to {name}"] = bootstrap_ratio(mine, np.array(base[0]))
            found.setdefault(grid, {})[arm] = entry
    return found


def print_table(results: dict) -> None:
    """KL and ratios, grid by grid."""
    table = Table("grid", "arm", "seeds", "KL", "to none (95 %)", "to none-permuted (95 %)", "head tied")
    form = lambda r: "" if r is None else f"{r['ratio']:.3f} ({r['low']:.3f}-{r['high']:.3f})"  # noqa: E731
    tied = {(row["grid"], row["arm"]): row["tied"] for row in results["rows"]}
    for grid, arms in results["ratios"].items():
        for arm, entry in sorted(arms.items(), key=lambda item: item[1]["kl"]):
            table.add_row(grid, arm, str(entry["seeds"]), f"{entry['kl']:.4f}", form(entry.get("to none")),
                          form(entry.get("to none-permuted")), "yes" if tied[grid, arm] else "no")
    console.print(table)


def save(path: Path, results: dict) -> None:
    """Write the results under their name in one step."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """What every script in this frame takes; it writes results/`name`.json."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--text", help="text file (default: WikiText-2 test, or the built-in text)")
    parser.add_argument("--nsamples", type=int, default=96)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{name}.json")
    return parser


def measure_missing(bench: Bench, ratios_of: Callable[[list[dict]], dict]) -> dict:
    """Measure the arms that `--out` lacks, writing each at once; InputError if it holds other settings'."""
    options = bench.options
    results = json.loads(options.out.read_text()) if options.out.exists() else {
        "settings": bench.settings, "versions": versions(), "rows": []}
    if results["settings"] != bench.settings:
        raise InputError(f"{options.out} was measured with other settings; choose another --out or remove it")
    done = {(row["grid"], row["arm"], row["seed"]) for row in results["rows"]}
    for grid, arm, seed in itertools.product(options.grids, options.arms, options.seeds):
        if (grid, arm, seed) in done or (seed != options.seeds[0] and arm.startswith("none")):
            continue
        results["rows"].append(bench.measure(grid, arm, seed))
        results["ratios"] = ratios_of(results["rows"])
        save(options.out, results)
        row = results["rows"][-1]
        console.print(f"{grid} {arm} {seed}: KL {row['kl']:.4f}, {row['seconds']}")
    return results


def run(parser: argparse.ArgumentParser, make_bench: Callable[..., Bench], grids, arms, ratios_of, show) -> None:
    """Command line of a script of arms: measure what is missing, `show` the results."""
    parser.add_argument("--grids", nargs="+", default=grids)
    parser.add_argument("--arms", nargs="+", default=arms)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    try:
        show(measure_missing(make_bench(parser.parse_args()), ratios_of))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run(arguments(__doc__.splitlines()[0], "rotations"), Bench, GRIDS,
        ["none", "optrot", "plus", "plus-r2", "plus-hadamard"], ratios, print_table)
