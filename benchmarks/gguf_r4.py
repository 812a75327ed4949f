"""What R4 is worth on `ffn_down`, and how wide its blocks must be: KL at blocks of 64 to 512 and at full width.

    python benchmarks/gguf_r4.py --text wiki.test.raw

*Model, text, score.* As in `rotations.py`: the dithered SmolLM2-135M, 96 × 256 calibration tokens, 32 × 256 evaluation
tokens; KL(float ‖ arm) in nats, in torch and float32.

*Arms.* Only the 30 `ffn_down` matrices are quantised, everything else stays float: W of each layer is turned by the
arm's orthogonal matrix R to `W R`, rounded by plain GPTQ under `Rᵀ H R`, H the second moments of what it reads in the
float model, and turned back, so that R needs no place in the graph. `none`: no R. A number: normalised Walsh-Hadamard
blocks of that many channels, as GGUF packages have them. `full`: one Hadamard matrix of all 1536 channels, which no
runtime here computes. With `--seeds` besides 0, signs are drawn at random before R (a seed of 0 has none).

Ratios carry a paired bootstrap 95 % interval over windows. `gguf_r4_speed.py` has what R4 costs.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from rich.table import Table
from rotations import Bench, arguments, console, run
from scoring import bootstrap_ratio, standard_error

from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models import open_model
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.hadamard import hadamard

GRIDS = ("q4_0", "q4_1", "q4_k")
ARMS = ("none", "64", "128", "256", "512", "full")
DAMP = 0.1


def turned(x: torch.Tensor, arm: str, signs: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    """Rows of `x` [..., n] times the arm's R, or with `back` times its transpose."""
    if arm == "none":
        return x
    n, core = x.shape[-1], None
    if arm == "full":
        order = n // (n & -n)
        while (found := hadamard(order)) is None or n % order:
            order *= 2
        core = found[0].to(x) if order > 1 else None
        if back and core is not None:
            core = core.T
    x = block_hadamard(x if back else x * signs, n if arm == "full" else int(arm), core=core)
    return x * signs if back else x


class Replaced:
    """A model with other `down` matrices, by layer."""

    def __init__(self, source, down: list[torch.Tensor]):
        self._source, self._down = source, down

    def __getattr__(self, name):
        return getattr(self._source, name)

    def layer(self, index, dtype=torch.float32):
        """The layer with its matrix replaced."""
        return self._source.layer(index, dtype) | {"down_proj.weight": self._down[index].to(dtype)}


class DownBench(Bench):
    """Scores of models of which only `ffn_down` is quantised."""

    def recipe(self, grid: str, arm: str, seed: int) -> Recipe:
        """What covariances are collected for."""
        return Recipe(type=grid, calibration=str(self.calibration), nsamples=self.options.nsamples,
                      seqlen=self.options.seqlen, rotation="none")

    def measure(self, grid: str, arm: str, seed: int) -> dict:
        """Quantise the matrices and score the model."""
        started, source = time.perf_counter(), open_model(self.model(permuted=False))
        inputs = self.calibration_inputs(source, self.recipe("q4_0", arm, 0), permuted=False)
        down, errors = [], []
        for index in range(source.config.num_hidden_layers):
            h = inputs.covariances.layer(index)["down"]
            weight = source.layer(index, torch.float64)["down_proj.weight"]
            decoded = self.quantized(weight, h, grid, arm, seed)
            difference = decoded - weight
            errors.append(float(torch.einsum("oi,ij,oj->", difference, h, difference)
                                / torch.einsum("oi,ij,oj->", weight, h, weight)))
            down.append(decoded)
        made = time.perf_counter()
        score = self.reference.score(self._logits(Replaced(source, down)))
        return {"grid": grid, "arm": arm, "seed": seed, **score,
                "kl_standard_error": standard_error(score["kl_windows"]), "relative_output_error": errors,
                "seconds": {"quantise": round(made - started, 1), "score": round(time.perf_counter() - made, 1)}}

    @staticmethod
    def quantized(weight: torch.Tensor, h: torch.Tensor, name: str, arm: str, seed: int) -> torch.Tensor:
        """The matrix [out, in] after a journey through the arm's basis and the grid, float64."""
        signs = torch.ones(len(h), dtype=h.dtype)
        if seed:
            signs = torch.randint(2, (len(h),), generator=torch.Generator().manual_seed(seed)).to(h) * 2 - 1
        weight, h = turned(weight, arm, signs), turned(turned(h, arm, signs).T, arm, signs).T
        grid = Grid(name)
        params = grid.fit(weight, h.diagonal())
        codes = gptq(weight, prepare_hessian(h, damp=DAMP, act_order=True), grid, params)
        return turned(grid.decode(codes, params).double(), arm, signs, back=True)


def ratios(rows: list[dict]) -> dict:
    """Per grid and arm: KL, and its ratios to no R4 and to full width."""
    found: dict = {}
    for grid in dict.fromkeys(row["grid"] for row in rows):
        mine = {arm: np.array([row["kl_windows"] for row in rows if (row["grid"], row["arm"]) == (grid, arm)])
                for arm in dict.fromkeys(row["arm"] for row in rows if row["grid"] == grid)}
        for arm, windows in mine.items():
            entry = {"kl": float(windows.mean()), "seeds": len(windows)}
            for base in {"none", "full"} & mine.keys() - {arm}:
                entry[f"to {base}"] = bootstrap_ratio(windows, mine[base].mean(0))
            found.setdefault(grid, {})[arm] = entry
    return found


def print_table(results: dict) -> None:
    """KL and ratios, grid by grid."""
    table = Table("grid", "R4", "KL", "to none (95 %)", "to full width (95 %)")
    for grid, arms in results["ratios"].items():
        for arm, entry in arms.items():
            found = [entry.get(f"to {base}") for base in ("none", "full")]
            cells = ["" if each is None else f"{each['ratio']:.3f} ({each['low']:.3f}-{each['high']:.3f})"
                     for each in found]
            table.add_row(grid, arm, f"{entry['kl']:.5f}", *cells)
    console.print(table)


if __name__ == "__main__":
    run(arguments(__doc__.splitlines()[0], "gguf_r4"), DownBench, GRIDS, ARMS, ratios, print_table)
