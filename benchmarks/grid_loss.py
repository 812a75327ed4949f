"""How well OptRot+'s loss predicts, block by block, what GPTQ loses on the native model.

    python benchmarks/grid_loss.py --text wiki.test.raw

GPTQ's rounding errors η of every block are read back from the decoded weights, and their cost `Σ η² C` is compared with
what `optrot_edge.rotations.grid_loss` expects. Per grid and input, over the layers measured:

* `damping`: share of `Σ η² D`, D of the damped covariance, that is the damping and no loss;
* `spread 0`: standard deviation of log(measured / expected) over blocks, weighted by what is measured, when the loss
  takes no account of the fit (c = 0);
* `spread`: the same with the constants in use, and `best c`: the constant of least spread.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from rotation_limits import layer_arguments, native_layers
from rotations import GRIDS, Bench, save

from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations import grid_loss
from optrot_edge.rotations.covariance import INPUTS
from optrot_edge.rotations.grid_loss import block_loss, column_cost

DAMP = 0.1
TRIED = (0.0, 0.4, 0.8, 1.2, 2.0, 3.0, 3.5, 4.0, 5.0)  # c


def blocks(weight: torch.Tensor, h: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """Per block Σ η² C and Σ η² D measured, n in effect, and the loss expected for every c of TRIED."""
    prepared, params = prepare_hessian(h, damp=DAMP), grid.fit(weight, h.diagonal())
    error = grid.decode(gptq(weight, prepared, grid, params), params).double() - weight
    costs, size, affine = column_cost(h, DAMP), grid.spec.group_size, grid.spec.is_affine
    eta = torch.empty_like(error)
    eta[:, costs.order] = torch.linalg.solve_triangular(costs.inverse, error[:, costs.order], upper=True,
                                                        unitriangular=True, left=False)
    squared = eta.square().sum(0)
    group = lambda t: t.view(-1, size)  # noqa: E731
    cost, ones = group(costs.cost), torch.ones(len(weight), dtype=weight.dtype)
    step = group(block_loss(weight, ones, torch.ones_like(costs.cost), size, affine=affine)[2])[:, 0]  # up to a factor
    expected = {c: step * grid_loss.fitted_cost(cost, c)[0] for c in TRIED}
    return (group(squared * costs.cost).sum(1), group(squared * prepared.column_cost).sum(1),
            cost.sum(1).square() / cost.square().sum(1), expected)


def spread(measured: torch.Tensor, expected: torch.Tensor) -> float:
    """Weighted standard deviation of log(measured / expected)."""
    ratio = (measured / expected.clamp_min(1e-300)).log()
    share = measured / measured.sum()
    return float((share * (ratio - share @ ratio).square()).sum().sqrt())


def main() -> None:
    """Measure every third layer and print a table."""
    options = layer_arguments(__doc__.splitlines()[0], "grid_loss")
    bench = Bench(options)
    found: dict[tuple[str, str], list] = {}
    for _, layer, stored in native_layers(bench):
        for kind, names in INPUTS.items():
            gain = layer.get(f"{kind}_norm.weight", torch.ones(len(stored[kind]), dtype=torch.float64))
            weight, h = torch.cat([layer[f"{n}.weight"] for n in names]), gain[:, None] * stored[kind] * gain
            for name in GRIDS:
                if len(h) % Grid(name).spec.group_size == 0:
                    found.setdefault((name, kind), []).append(blocks(weight, h, Grid(name)))
    rows = []
    for (name, kind), layers in found.items():
        measured, damped, n = (torch.cat([x[i] / x[0].sum() for x in layers]) if i < 2 else
                               torch.cat([x[i] for x in layers]) for i in range(3))
        expected = {c: torch.cat([x[3][c] / x[0].sum() for x in layers]) for c in TRIED}
        spreads = {c: spread(measured, e) for c, e in expected.items()}
        used = grid_loss.FITTED["affine" if Grid(name).spec.is_affine else "symmetric"]
        rows.append({"grid": name, "input": kind, "blocks": len(measured), "least_n": float(n.min()),
                     "damping": 1 - float(measured.sum() / damped.sum()), "spread_0": spreads[0.0],
                     "spread": spreads[used], "best_c": min(spreads, key=spreads.get), "spreads": spreads})
    save(options.out, {"settings": bench.settings, "fitted": grid_loss.FITTED, "rows": rows})
    table = Table("grid", "input", "damping", "spread 0", "spread", "best c")
    for row in rows:
        table.add_row(row["grid"], row["input"], *(f"{row[k]:.3f}" for k in ("damping", "spread_0", "spread")),
                      f"{row['best_c']:.1f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
