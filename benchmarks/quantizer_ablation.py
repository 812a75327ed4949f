"""What each part of the quantiser brings: KL of GPTQ with and without it, in the frame of `rotations.py`.

    python benchmarks/quantizer_ablation.py --text wiki.test.raw

*Model, text, score.* As in `rotations.py`: the dithered SmolLM2-135M, 96 × 256 calibration tokens, 32 × 256 evaluation
tokens, embedding and head F16, KL(float ‖ arm) in nats, decoded weights in torch, float32.

*Arms.* `gptq`: GPTQ on frozen grids and the quantised model's inputs, nothing more. `inputs`, `residual`: it makes up
for the errors made before it in its inputs, and in the residual stream too (`asymmetric`). `refit`: scales fitted
again after it, twice (`refits`). `guidance`: tokens weighted by the end loss's gradients. `distill`: scales, mins and
norm gains learn from the float model for four epochs; GPTQ calibrates on three quarters of the windows and they learn
from the last, so that no arm reads more text. `default`: residual and refit. `default-guidance`, `default-distill`:
that with one part more; `all`: with both. `plus-r2` after a + rotates with OptRot+ (R2, scales) first.

Ratios to `gptq`, and of what adds to `default` to that, carry a paired bootstrap 95 % interval over windows. Arms are
written to `--out` as they are done.
"""

from __future__ import annotations

import sys

import numpy as np
from rich.console import Console
from rich.table import Table
from rotations import ARMS as ROTATIONS
from rotations import Bench, arguments, run
from scoring import bootstrap_ratio

from optrot_edge.recipe import Recipe

PLAIN = {"asymmetric": "none", "refits": 0}
DEFAULT = {"asymmetric": "residual", "refits": 2}
PARTS = {
    "gptq": PLAIN,
    "inputs": PLAIN | {"asymmetric": "inputs"},
    "residual": PLAIN | {"asymmetric": "residual"},
    "refit": PLAIN | {"refits": 2},
    "guidance": PLAIN | {"guidance": "tokens"},
    "distill": PLAIN | {"distill": 4},
    "default": DEFAULT,
    "default-guidance": DEFAULT | {"guidance": "tokens"},
    "default-distill": DEFAULT | {"distill": 4},
    "all": DEFAULT | {"guidance": "tokens", "distill": 4},
}


class Ablation(Bench):
    """Arms that differ in the quantiser."""

    def recipe(self, grid: str, arm: str, seed: int) -> Recipe:
        """`part` or `part+rotation`."""
        part, _, rotation = arm.partition("+")
        fields = ROTATIONS[rotation or "none"] | PARTS[part]
        nsamples = self.options.nsamples * 3 // 4 if "distill" in fields else self.options.nsamples
        return Recipe(type=grid, embedding_type="f16", head_type="f16", calibration=str(self.calibration), seed=seed,
                      nsamples=nsamples, seqlen=self.options.seqlen, **fields)


def ratios(rows: list[dict]) -> dict:
    """Per grid and arm: KL, its ratio to `gptq`, and that of what adds to `default` to it."""
    kl = {(row["grid"], row["arm"], row["seed"]): row["kl_windows"] for row in rows}
    found: dict = {}
    for grid, arm, seed in kl:
        windows = kl[grid, arm, seed]
        entry: dict = {"kl": float(np.mean(windows))}
        if arm != "gptq" and (grid, "gptq", seed) in kl:
            entry |= bootstrap_ratio(np.array([windows]), np.array(kl[grid, "gptq", seed]))
        if arm != "default" and arm.startswith(("default", "all")) and (grid, "default", seed) in kl:
            entry["to default"] = bootstrap_ratio(np.array([windows]), np.array(kl[grid, "default", seed]))
        found.setdefault(grid, {})[arm] = entry
    return found


def print_table(results: dict) -> None:
    """KL and ratios, grid by grid."""
    form = lambda r: f"{r['ratio']:.3f} ({r['low']:.3f}-{r['high']:.3f})" if "ratio" in r else ""  # noqa: E731
    table = Table("grid", "arm", "KL", "to gptq (95 %)", "to default (95 %)", "seconds")
    seconds = {(row["grid"], row["arm"]): row["seconds"]["quantise"] for row in results["rows"]}
    for grid, arms in results["ratios"].items():
        for arm, entry in sorted(arms.items(), key=lambda item: -item[1]["kl"]):
            table.add_row(grid, arm, f"{entry['kl']:.4f}", form(entry), form(entry.get("to default", {})),
                          f"{seconds[grid, arm]:.0f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    run(arguments(__doc__.splitlines()[0], "quantizer_ablation"), Ablation, ["q4_1", "q4_0"],
        [*PARTS, "default+plus-r2", "all+plus-r2"], ratios, print_table)
