"""What a step of SpinQuant learns from: how far the gradients of different steps of so many tokens agree.

    python benchmarks/e2e_gradients.py --text wiki.test.raw

For each variant the gradient of the loss by R1 and by R2, at the random Hadamards that the learning starts from, on
three steps of other tokens; as skew matrices, on the group. Printed is the mean cosine of their pairs: 0 where a step's
gradient is the noise of its tokens, 1 where every step says the same. Losses are cross-entropy (as published) or the KL
from the float model (`kl-top`); gradients pass straight through the rounding alone (as in SpinQuant's code) or through
its range too. The model is the dithered SmolLM2-135M of `testbed.py`, with R4.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rotations import save
from testbed import build_testbed
from texts import load_text

from optrot_edge.models import open_model
from optrot_edge.rotations.baselines import END_TO_END, LOSSES
from optrot_edge.rotations.end_to_end import EndToEndLearner, QuantizedNetwork, grids_by_width
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.rounding import Rounding
from optrot_edge.rotations.solvers import skew_gradient
from optrot_edge.runtime.evaluate import tokenize_for

ARMS = ("spinquant", "spinquant-a4", "spinquant-w4")
GRID, R4_BLOCK, WINDOW, STEPS = "int4-g192-zero", 512, 256, 3


def agreement(gradients: list[torch.Tensor]) -> float:
    """Mean cosine of all pairs."""
    pairs = itertools.combinations([gradient.flatten() for gradient in gradients], 2)
    return statistics.fmean(float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs)


def measured(source, start, tokens: torch.Tensor, name: str, loss: str, through_range: bool, step_tokens: int) -> dict:
    """One row: the loss at the start and the agreement of the steps' gradients."""
    options = replace(END_TO_END[name], loss=loss, through_range=through_range, tokens=step_tokens)
    rounding = Rounding(options.activations, grids_by_width(source, GRID) if options.weights else None, through_range)
    network = QuantizedNetwork(source, rounding, loss, tokens, step_tokens)
    learner = EndToEndLearner(network, start, options, torch.Generator())
    losses, skews = [], {"r1": [], "r2": []}
    for windows in torch.arange(len(tokens)).chunk(STEPS):
        for matrix in learner.rotations.values():
            matrix.grad = None
        losses.append(network.loss(windows, learner.point()))
        for key, matrix in learner.rotations.items():
            skews[key].append(skew_gradient(matrix.detach(), matrix.grad))
    return {"rotation": name, "loss": loss, "gradients": "range" if through_range else "straight-through",
            "at_start": statistics.fmean(losses), "norm_r1": statistics.fmean(float(s.norm()) for s in skews["r1"]),
            "agreement_r1": agreement(skews["r1"]), "agreement_r2": agreement(skews["r2"])}


def main() -> None:
    """Measure every variant and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="text to calibrate on (default: WikiText-2)")
    parser.add_argument("--tokens", type=int, default=1024, help="of a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "e2e_gradients.json")
    options = parser.parse_args()
    path, text = build_testbed(options.work / "testbed"), load_text(options.text)
    source = open_model(path)
    count = STEPS * options.tokens // WINDOW
    tokens = torch.from_numpy(tokenize_for(path, None, text.calibration, WINDOW, count))
    generator = torch.Generator().manual_seed(options.seed)
    start = initial_rotation(source.config, {"r1", "r2"}, generator, r4_block=R4_BLOCK)
    table, rows = Table("rotation", "loss", "gradients", "at the start", "R1 agrees", "R2 agrees"), []
    for name, loss, through_range in itertools.product(ARMS, LOSSES, (False, True)):
        row = measured(source, start, tokens, name, loss, through_range, options.tokens)
        rows.append(row)
        table.add_row(name, loss, row["gradients"], f"{row['at_start']:.5g}",
                      f"{row['agreement_r1']:.3f}", f"{row['agreement_r2']:.3f}")
        Console(width=140).print(" ".join(map(str, row.values())))
    save(options.out, {"settings": {"model": path.name, "text": text.source, "tokens": options.tokens, "steps": STEPS,
                                    "window": WINDOW, "grid": GRID, "r4_block": R4_BLOCK, "seed": options.seed},
                       "rows": rows})
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
