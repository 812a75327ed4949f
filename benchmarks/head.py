"""What rounding the vocabulary's matrix costs, and what GPTQ spares of it, by type: KL and bytes.

    python benchmarks/head.py --text wiki.test.raw

The frame is that of `rotations.py`: the dithered SmolLM2-135M, whose one matrix of 49152 × 576 is embedding and head,
96 × 256 calibration tokens, 32 × 256 evaluation tokens, KL(float ‖ arm) in nats in torch. Every other matrix stays
float, so a KL is this matrix's alone. `rtn`: weighted scales, rounding. `gptq`: GPTQ with the Hessian of the final
hidden states, though the rows are looked up as an embedding too. `refit`: scales fitted again after it, twice; what
the quantiser does.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rotations import Bench, arguments, run
from scoring import bootstrap_ratio, standard_error

from optrot_edge.formats import bits_of
from optrot_edge.inputs import calibration_windows
from optrot_edge.models import open_model
from optrot_edge.models.forward import final_hidden
from optrot_edge.quantize.gptq import prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.refit import gptq_with_refits
from optrot_edge.quantize.statistics import MeanProduct
from optrot_edge.recipe import Recipe

ARMS = {"rtn": None, "gptq": 0, "refit": 2}


class Head(Bench):
    """Arms that differ in how the tied matrix is quantised."""

    def hessian(self, source) -> torch.Tensor:
        """Of the float model's final hidden states."""
        tokens, _ = calibration_windows(source, Recipe(
            rotation="none", calibration=str(self.calibration), nsamples=self.options.nsamples,
            seqlen=self.options.seqlen))
        total = MeanProduct(source.config.hidden_size, source.config.hidden_size, "cpu")
        for part in tokens.split(8):
            total.add(final_hidden(source, part))
        return total.mean()

    def measure(self, grid: str, arm: str, seed: int) -> dict:
        """Quantise the matrix and score the model that has it."""
        source = open_model(self.model(permuted=False))
        if not hasattr(self, "_hessian"):
            self._hessian = self.hessian(source)
        kind, h, weight, parts = Grid(grid), self._hessian, source.embedding(torch.float32), []
        prepared = prepare_hessian(h, damp=0.1)
        for rows in weight.split(8192):
            params = kind.fit(rows, h.diagonal())
            if ARMS[arm] is None:
                codes = kind.round(rows, params)
            else:
                codes, params = gptq_with_refits(rows, h, prepared, kind, params, ARMS[arm])
            parts.append(kind.decode(codes, params))
        decoded = torch.cat(parts)
        source.embedding = lambda dtype=torch.float32: decoded.to(dtype)
        score = self.reference.score(self._logits(source))
        return {"grid": grid, "arm": arm, "seed": seed, **score, "bytes": weight.numel() * bits_of(grid) / 8,
                "kl_standard_error": standard_error(score["kl_windows"]), "seconds": {}}


def ratios(rows: list[dict]) -> dict:
    """Per grid and arm: KL, and its ratio to `rtn`."""
    found: dict = {}
    for row in rows:
        base = [r["kl_windows"] for r in rows if (r["grid"], r["arm"]) == (row["grid"], "rtn")]
        entry = {"kl": row["kl"], "bytes": row["bytes"]}
        if row["arm"] != "rtn":
            entry |= bootstrap_ratio(np.array([row["kl_windows"]]), np.array(base[0]))
        found.setdefault(row["grid"], {})[row["arm"]] = entry
    return found


def print_table(results: dict) -> None:
    """KL and ratios, grid by grid."""
    table = Table("type", "MB", "arm", "KL", "to rtn (95 %)")
    for grid, arms in results["ratios"].items():
        for arm, entry in arms.items():
            ratio = f"{entry['ratio']:.3f} ({entry['low']:.3f}-{entry['high']:.3f})" if "ratio" in entry else ""
            table.add_row(grid, f"{entry['bytes'] / 1e6:.1f}", arm, f"{entry['kl']:.5f}", ratio)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    run(arguments(__doc__.splitlines()[0], "head"), Head, ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"], list(ARMS), ratios,
        print_table)
