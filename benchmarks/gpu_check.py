"""Kernels and benchmarks on a CUDA GPU, in steps of a few minutes, on random weights.

    make gpu-check                                  every step
    make gpu-check STEPS="kernels objective"        some
    python benchmarks/gpu_check.py --interpret      the kernels' steps in Triton's interpreter, tiny, no GPU
    python benchmarks/gpu_check.py --cpu            the other steps at tiny sizes, no GPU

Steps: kernels (each against its torch twin), objective, hadamard, fake-quant (each timed against torch), rotation,
quantizer (the GPU against the CPU, then times), gptq (timed against its plain loop and its products alone, and over
8B-shaped layers), optrot-8b (a rotation of an 8B-shaped model from end to end). Imports torch, triton, numpy and
safetensors besides this repository; installs nothing. Each step prints tables and is merged into
benchmarks/results/gpu_check.json under its own name, one that breaks off with its error; where that leaves the GPU
unusable for the steps after it, pick those again. Exit codes: 0 all steps passed, 1 one failed, 2 bad usage or no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import gpu_8b  # noqa: E402
import gpu_gptq  # noqa: E402
import gpu_kernels  # noqa: E402
import gpu_road  # noqa: E402
import gpu_speed  # noqa: E402
import torch  # noqa: E402

from optrot_edge.kernels.launch import triton  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.json"
# Name to function(device) -> dict for the JSON; `passed: False` in it fails the run.
IN_INTERPRETER: dict[str, Callable[[str], dict]] = {
    "kernels": gpu_kernels.kernels_step,
    "objective": gpu_speed.objective_step,
    "hadamard": gpu_speed.hadamard_step,
    "fake-quant": gpu_speed.fake_quant_step,
}
ON_CPU: dict[str, Callable[[str], dict]] = {
    "rotation": gpu_road.rotation_step,
    "quantizer": gpu_road.quantizer_step,
    "gptq": gpu_gptq.gptq_step,
    "optrot-8b": gpu_8b.optrot_8b_step,
}
STEPS = IN_INTERPRETER | ON_CPU


def main(argv: list[str] | None = None) -> int:
    """Run the chosen steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"any of: {', '.join(STEPS)} (default: all)")
    parser.add_argument("--interpret", action="store_true", help=f"on CPU, tiny: {', '.join(IN_INTERPRETER)}")
    parser.add_argument("--cpu", action="store_true", help=f"on CPU, tiny: {', '.join(ON_CPU)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to merge the results into")
    args = parser.parse_args(argv)
    if unknown := [step for step in args.steps if step not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}; choose from {', '.join(STEPS)}")
    if args.interpret and args.cpu:
        parser.error("--interpret and --cpu run different steps; give one")
    without_gpu = IN_INTERPRETER if args.interpret else ON_CPU if args.cpu else {}
    if without_gpu and set(args.steps) - set(without_gpu):
        parser.error(f"{'--interpret' if args.interpret else '--cpu'} runs {', '.join(without_gpu)} only")
    if triton is None:
        print("gpu-check: triton is not installed for this Python", file=sys.stderr)
        return 2
    if not without_gpu and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA GPU; pass --interpret to run the kernels' "
              "steps in Triton's interpreter, or --cpu for the others", file=sys.stderr)
        return 2
    failed = []
    for name in args.steps or without_gpu or STEPS:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            result = STEPS[name]("cpu" if without_gpu else "cuda")
        except Exception as error:  # of one step: the others are to be run and kept all the same
            traceback.print_exc()
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        result |= {"seconds": round(time.perf_counter() - start, 1), "environment": environment()}
        for table in ("worst", "checks", "timings", "rows", "hessian"):
            if table in result:
                print_table(result[table])
        merge(args.out, name, result)
        if not result.get("passed", True):
            failed.append(name)
    print(f"results: {args.out}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all passed"))
    return 1 if failed else 0


def environment() -> dict:
    """What the numbers depend on."""
    info = {"python": platform.python_version(), "torch": torch.__version__,
            "triton": triton.__version__, "gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        info |= {"gpu": properties.name, "gpu_gib": round(properties.total_memory / 2**30, 1),
                 "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
    return info


def merge(path: Path, name: str, result: dict) -> None:
    """Replace step `name` in the JSON file, keep the others."""
    steps = json.loads(path.read_text()) if path.exists() else {}
    steps[name] = result
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(steps, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def print_table(rows: list[dict]) -> None:
    """Rows of one set of keys, as aligned text."""
    cells = [list(rows[0]), *([f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
                              for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
