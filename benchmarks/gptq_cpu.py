"""Seconds that quantising SmolLM2-135M's 210 matrices takes on a CPU, stage by stage, without the calibration forward.

    python benchmarks/gptq_cpu.py [--grid q4_0]

Random heavy-tailed weights and the Hessians of correlated inputs at the model's four stacked shapes; every stage is
the median of five runs for one layer, and 30 layers are 30 times that. Seconds are processor seconds of one thread,
which are wall seconds where nothing else runs and which other programs hardly change. Beside the stages: the plain
loop over columns (`gptq_loop.py`), whose codes have to be the same. Writes results/gptq_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from gptq_loop import plain_gptq
from gpu_check import print_table
from gpu_road import calibration, hessian_of, random_model

from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.statistics import matrix_report

RESULTS = Path(__file__).parent / "results" / "gptq_cpu.json"
LAYERS = 30
SHAPES = {"q, k, v": (960, 576), "o": (576, 576), "gate, up": (3072, 576), "down": (576, 1536)}
TOKENS = 4096
RUNS = 5
STAGES = ("factor", "fit", "columns", "report")


def one_run(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> tuple[dict[str, float], bool]:
    """Seconds of every stage and of the plain loop, and whether both loops chose the same codes."""
    ticks = [time.process_time()]

    def tick(value):
        ticks.append(time.process_time())
        return value

    prepared = tick(prepare_hessian(hessian, damp=0.1))
    params = tick(grid.fit(weight, hessian.diagonal()))
    codes = tick(gptq(weight, prepared, grid, params))
    tick(matrix_report(weight, grid.decode(codes, params), hessian))
    plain = tick(plain_gptq(weight, prepared, grid, params))
    taken = [late - early for early, late in zip(ticks, ticks[1:], strict=False)]
    return dict(zip((*STAGES, "plain columns"), taken, strict=True)), torch.equal(codes, plain)


def measure(grid: Grid, shapes: dict[str, tuple[int, int]], tokens: int, runs: int = RUNS) -> list[dict]:
    """A row per shape: medians in seconds, and how much faster the columns are than the plain loop's."""
    rows = []
    for name, (out, width) in shapes.items():
        weight = random_model(width, out, 4, 4, layers=1).layer(0)["gate_proj.weight"]
        hessian = hessian_of(calibration(tokens, width), "cpu")
        series = [one_run(weight, hessian, grid) for _ in range(runs)]
        medians = {stage: sorted(seconds[stage] for seconds, _ in series)[runs // 2] for stage in series[0][0]}
        rows.append({"matrices": name, "out": out, "in": width, **medians,
                     "plain / columns": medians["plain columns"] / medians["columns"],
                     "same codes": all(same for _, same in series)})
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and merge it into the JSON under the grid's name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", default="q4_0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = measure(Grid(args.grid), SHAPES, TOKENS)
    total = {stage: LAYERS * sum(row[stage] for row in rows) for stage in (*STAGES, "plain columns")}
    print_table(rows)
    seconds = sum(total[stage] for stage in STAGES)
    print(f"{LAYERS} layers, one thread: {seconds:.1f} s = "
          + " + ".join(f"{stage} {total[stage]:.1f}" for stage in STAGES)
          + f"; columns {total['plain columns'] / total['columns']:.2f} times as fast as the plain loop")
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results[args.grid] = {"rows": rows, "layers": LAYERS, "total": total, "seconds": seconds, "threads": 1,
                          "torch": torch.__version__, "runs": RUNS, "statistic": "median"}
    args.out.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
