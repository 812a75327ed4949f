"""OptRot as published against the fast solver: loss over time, side by side on the same gradient.

Baseline: Cayley SGD on all rows (arXiv 2512.24124; learning rate 1, 1000 steps). Fast: the tool's default. Both
start from the same random Hadamard R1 and R2, run in one process at one number of threads in float32, and
share the closed-form gradient; both keep the layers in memory, so no disk is timed. They take turns, a share of
each at a time, so that whatever else the machine does meets both. Every few steps the exact objective is
evaluated, and that is not timed; each solver's own time includes drawing rows and its loss estimates. The
fast solver passes when it achieves 97 % of the baseline's fall in a twentieth of the baseline's time.

    python benchmarks/rotation_solvers.py [--model FILE] [--layers 6] [--cayley-steps 1000] [--threads 1]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from testbed import build_testbed

from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.rotations.learner import Learner
from optrot_edge.rotations.optrot import OptRotOptions, initial_rotation

TURNS = 20  # shares into which both runs are cut
BAR = {"share_of_fall": 0.97, "share_of_time": 1 / 20}


class SomeLayers:
    """`count` layers of a model, evenly spaced from first to last, held in memory. The interface of a reader."""

    def __init__(self, source, count: int):
        total = source.config.num_hidden_layers
        if not 1 <= count <= total:
            raise InputError(f"--layers {count}: the model has {total}")
        self.indices = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
        self.config = dataclasses.replace(source.config, num_hidden_layers=count)
        self.layers = [source.layer(index) for index in self.indices]

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in self.layers[index].items()}


class Run:
    """One solver's run in shares, and the exact objective after each."""

    def __init__(self, source, start, options: OptRotOptions, seed: int, device: str):
        self.options, self.device, self.seconds = options, device, 0.0
        self.learner = Learner(source, start, options, torch.Generator().manual_seed(seed), device)
        for _ in self.learner.layers():  # so that the first turn finds the layers in memory
            pass
        self.points = [[0, 0.0, self.exact()]]  # steps, seconds, exact loss
        self.passes = self.learner.passes()

    def exact(self) -> float:
        """The objective, untimed."""
        return float(self.learner.losses().sum())

    def turn(self, steps: int) -> None:
        """Go on until `steps` steps are done (timed), then evaluate."""
        done = self.points[-1][0]
        if done >= steps:
            return
        started = time.perf_counter()
        while done < steps:
            done, _ = next(self.passes)
        self._stop(started)
        self.points.append([done, self.seconds, self.exact()])

    def finish(self) -> None:
        """Project to orthogonal matrices (timed), then evaluate: the last point is what a user gets."""
        started = time.perf_counter()
        self.learner.finish()
        self._stop(started)
        self.points.append([self.points[-1][0], self.seconds, self.exact()])

    def _stop(self, started: float) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started

    def outcome(self) -> dict:
        """For the JSON: options, points, and the end."""
        options = dataclasses.asdict(self.options)
        return {"options": options, "points": self.points, "seconds": self.seconds, "loss": self.points[-1][2]}


def compare(source, options: dict[str, OptRotOptions], seed: int, device: str) -> dict:
    """Run all `options` by turns from one start; their outcomes by name."""
    start = initial_rotation(source.config, {"r1", "r2"}, torch.Generator().manual_seed(seed))
    runs = {name: Run(source, start, chosen, seed, device) for name, chosen in options.items()}
    for share in range(1, TURNS + 1):
        for name, run in runs.items():
            before = len(run.points)
            run.turn(round(share * run.options.steps / TURNS))
            if len(run.points) == before:
                continue
            steps, seconds, loss = run.points[-1]
            print(f"{name:>8}: step {steps:4d}  {seconds:7.1f} s  loss {loss:.2f}", flush=True)
    for run in runs.values():
        run.finish()
    return {name: run.outcome() for name, run in runs.items()}


def verdict(runs: dict[str, dict]) -> dict:
    """The fast run against the baseline: shares of its fall in loss and of its time, and when it met the bar."""
    base, fast = runs["cayley"], runs["fast"]
    start = base["points"][0][2]
    fall = start - base["loss"]
    reached = {name: next((seconds for _, seconds, loss in run["points"]
                           if start - loss >= BAR["share_of_fall"] * fall), None) for name, run in runs.items()}
    share, part = (start - fast["loss"]) / fall, fast["seconds"] / base["seconds"]
    return {"loss_start": start, "target": start - BAR["share_of_fall"] * fall, "share_of_fall": share,
            "share_of_time": part, "times_faster": 1 / part, "seconds_to_target": reached,
            "bar": BAR, "passed": share >= BAR["share_of_fall"] and part <= BAR["share_of_time"]}


def plot(result: dict, path: Path) -> None:
    """Loss over time, logarithmic in time."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("the plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"cayley": "Cayley SGD, all rows (as published)", "fast": "fast (default)"}
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name, run in result["runs"].items():
        points = run["points"][1:]
        axes.plot([p[1] for p in points], [p[2] for p in points], marker="o", markersize=3, label=names[name])
    axes.axhline(result["verdict"]["target"], color="gray", linestyle="--", linewidth=1,
                 label=f"{BAR['share_of_fall']:.0%} of the published fall")
    axes.set(xscale="log", xlabel=f"seconds ({result['threads']} CPU thread(s), {result['device']})",
             ylabel="Σ ‖vec W̃‖₄⁴ (exact)", title=f"OptRot on {len(result['layers'])} layers of {result['model']}")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def show(result: dict) -> None:
    """The table and the verdict."""
    table = Table("solver", "steps", "rows per step", "seconds", "loss", "fall, % of the published")
    found = result["verdict"]
    fall = found["loss_start"] - result["runs"]["cayley"]["loss"]
    for name, run in result["runs"].items():
        table.add_row(name, str(run["points"][-1][0]), str(run["rows"] or "all"), f"{run['seconds']:.1f}",
                      f"{run['loss']:.2f}", f"{100 * (found['loss_start'] - run['loss']) / fall:.2f}")
    console = Console(width=110)
    console.print(table)
    console.print("seconds to the bar's loss: " + ", ".join(
        f"{name} {'never' if seconds is None else f'{seconds:.1f}'}"
        for name, seconds in found["seconds_to_target"].items()), highlight=False)
    console.print(f"start {found['loss_start']:.2f}; {found['times_faster']:.1f} times faster; the bar "
                  f"({BAR['share_of_fall']:.0%} of the fall in 1/{1 / BAR['share_of_time']:.0f} of the time) is "
                  f"{'met' if found['passed'] else 'NOT met'}; {result['wall_seconds']:.0f} s in all", highlight=False)


def main() -> None:
    """Run, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model (default: the float testbed of SmolLM2-135M)")
    parser.add_argument("--layers", type=int, default=6, help="how many, evenly spaced")
    parser.add_argument("--cayley-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, help="of the fast solver (default: its own)")
    parser.add_argument("--rows", type=int, help="per step of the fast solver (default: its own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--testbed", default="out/testbed", help="folder of the testbed, built when missing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "rotation_solvers.json",
                        help="the JSON; the plot is written beside it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Path(arguments.model or build_testbed(arguments.testbed))
    source = SomeLayers(open_model(model), arguments.layers)
    options = {"cayley": OptRotOptions("cayley", arguments.cayley_steps, None),
               "fast": OptRotOptions(steps=arguments.steps, rows="auto" if arguments.rows is None else arguments.rows)}
    started = time.perf_counter()
    runs = compare(source, options, arguments.seed, arguments.device)
    for name, run in runs.items():
        run["rows"] = options[name].rows_per_step(source.config.hidden_size)
    result = {"model": model.stem, "layers": source.indices, "device": arguments.device,
              "threads": arguments.threads, "seed": arguments.seed, "torch": torch.__version__, "runs": runs,
              "verdict": verdict(runs), "wall_seconds": time.perf_counter() - started}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    plot(result, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
