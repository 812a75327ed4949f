"""What limits a rotation: how far the native model's expected GPTQ loss is from what any R1 could reach.

    python benchmarks/rotation_limits.py --text wiki.test.raw

With column costs D (of H, the input's covariance, all but undamped) and column energies E of a weight
stack, the loss to expect on a block grid is `κ Σ_blocks (Σ_j E_j / b)(Σ_j D_j)`: κ is the grid's error for the
shape of the weights inside a block (κ of Gaussian weights is what a dense rotation gives), the rest follows from
basis and scales. Printed per input, as medians over the layers:

* `hadamard`: the basis part after folding the norm gain and a random Hadamard, to that of the native model;
* `bound`: its smallest value over *every* R1 and every channel scale chosen for this one input alone,
  `d · (det WᵀW · det H)^(1/d)` (Hadamard's inequality and that of the means), to native: no rotation, shared
  or not, gets below;
* `scales`: with the best channel scales alone, `Σ_j E_j D_j`, to native;
* `κ`: error of the grid on Gaussian weights to that on the native weights, unweighted.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from rotations import GRIDS, Bench, arguments, save

from optrot_edge.models import open_model
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations.covariance import INPUTS, collect
from optrot_edge.rotations.grid_loss import column_cost
from optrot_edge.rotations.hadamard import random_hadamard

BLOCK, DAMP = 32, 1e-3


def blocked(energy: torch.Tensor, cost: torch.Tensor) -> float:
    """Σ_blocks mean(E) Σ D."""
    return float((energy.view(-1, BLOCK).mean(1) * cost.view(-1, BLOCK).sum(1)).sum())


def limits(layer: dict, stored: dict, kind: str, rotation: torch.Tensor) -> dict:
    """The basis ratios of one input."""
    weight = torch.cat([layer[f"{name}.weight"] for name in INPUTS[kind]])
    gain = layer.get(f"{kind}_norm.weight", torch.ones(weight.shape[1], dtype=torch.float64))
    h = gain[:, None] * stored[kind] * gain
    cost, energy = column_cost(h, DAMP).cost, weight.square().sum(0)
    native = blocked(energy, cost)
    found = {"scales": float(energy @ cost) / native}
    if kind in ("attn", "mlp"):
        width = len(h)
        turned = column_cost(rotation.T @ stored[kind] @ rotation, DAMP).cost
        folded = (weight * gain @ rotation).square().sum(0)
        damped = h + DAMP * h.diagonal().mean() * torch.eye(width, dtype=h.dtype)
        dets = torch.linalg.slogdet(weight.T @ weight)[1] + torch.linalg.slogdet(damped)[1]
        found |= {"hadamard": blocked(folded, turned) / native, "bound": width * float((dets / width).exp()) / native}
    for name in GRIDS:
        grid = Grid(name)
        if weight.shape[1] % grid.spec.group_size == 0:
            gauss = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            found[f"κ {name}"] = relative_error(grid, gauss) / relative_error(grid, weight.float())
    return found


def relative_error(grid: Grid, weight: torch.Tensor) -> float:
    """Squared error of rounding to fitted grids, to the energy."""
    params = grid.fit(weight)
    error = grid.decode(grid.round(weight, params), params) - weight
    return float(error.square().sum() / weight.square().sum())


def layer_arguments(description: str, name: str) -> argparse.Namespace:
    """Command line of a script that looks at native layers and writes `name`.json."""
    parser = arguments(description, name)
    parser.add_argument("--every", type=int, default=3, help="take every n-th layer")
    return parser.parse_args()


def native_layers(bench: Bench) -> Iterator[tuple[int, dict, dict]]:
    """(index, layer, its input covariances) of the native testbed, float64."""
    source, options = open_model(bench.model(permuted=False)), bench.options
    tokens = bench.calibration_inputs(source, bench.recipe("q4_0", "none", 0), False).tokens
    with tempfile.TemporaryDirectory(dir=options.work) as folder, collect(source, tokens, folder=folder) as held:
        for index in range(0, source.config.num_hidden_layers, options.every):
            yield index, source.layer(index, torch.float64), held.layer(index)


def main() -> None:
    """Measure every third layer and print medians."""
    options = layer_arguments(__doc__.splitlines()[0], "rotation_limits")
    bench, rotation, rows = Bench(options), None, []
    for index, layer, stored in native_layers(bench):
        if rotation is None:
            rotation = random_hadamard(len(stored["mlp"]), torch.Generator().manual_seed(0))[0]
        rows += [{"layer": index, "input": kind, **limits(layer, stored, kind, rotation)} for kind in INPUTS]
    names = list(dict.fromkeys(name for row in rows for name in row if name not in ("layer", "input")))
    median = {kind: {name: float(torch.tensor([r[name] for r in rows if r["input"] == kind]).median())
                     for name in names if all(name in r for r in rows if r["input"] == kind)} for kind in INPUTS}
    save(options.out, {"settings": bench.settings, "median": median, "rows": rows})
    table = Table("input", *names, title="To the native model, medians over layers", title_justify="left")
    for kind, entry in median.items():
        table.add_row(kind, *(f"{entry[name]:.3f}" if name in entry else "" for name in names))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
