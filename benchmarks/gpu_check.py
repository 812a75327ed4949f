"""Kernels and benchmarks on a CUDA GPU, in steps of a few minutes, on random weights.

    make gpu-check                                  every step
    make gpu-check STEPS="kernels objective"        some
    python benchmarks/gpu_check.py --interpret      the kernels step in Triton's interpreter, no GPU
    python benchmarks/gpu_check.py --cpu            the rotation and quantizer steps at tiny sizes, no GPU

Imports torch, triton, numpy and safetensors besides this repository; installs nothing. Each step prints a table and
is merged into benchmarks/results/gpu_check.json under its own name. Exit codes: 0 all steps passed,
1 one failed, 2 bad usage or no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import gpu_road  # noqa: E402
import torch  # noqa: E402

from optrot_edge.kernels import fourth_power as objective_kernels  # noqa: E402
from optrot_edge.kernels import hadamard as hadamard_kernels  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.json"
# Rows and columns of the weights of Llama-3.1-8B as the objective reads them: `Y = X R1`.
LLAMA_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up, down": (14336, 4096)}
# Relative error of loss and gradient (Frobenius) against the twin, up to d = 256, then growing as √d as
# rounding does. Tensor cores truncate to tf32: Y shrinks by about 2⁻¹⁰·⁵, Y³ and Y⁴ by 3 and 4 times that.
# In bfloat16 both sides round Y³ alike, except where float32's last bits tip it over. The interpreter
# truncates to bfloat16 where GPUs round, half a unit in the last place (2⁻⁸) on average.
TOLERANCES = {"float32 ieee": 1e-6, "float32 tf32": 5e-3, "bfloat16 ieee": 1e-4}
INTERPRETER_BF16 = 6e-3
REPEATS = 15  # timed calls per function; their median is reported


def main(argv: list[str] | None = None) -> int:
    """Run the chosen steps; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"any of: {', '.join(STEPS)} (default: all)")
    parser.add_argument("--interpret", action="store_true", help="kernels step only, on CPU, tiny shapes")
    parser.add_argument("--cpu", action="store_true", help="rotation and quantizer steps only, on CPU, tiny sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON file to merge the results into")
    args = parser.parse_args(argv)
    if unknown := [step for step in args.steps if step not in STEPS]:
        parser.error(f"unknown step {unknown[0]!r}; choose from {', '.join(STEPS)}")
    if args.interpret and args.cpu:
        parser.error("--interpret and --cpu run different steps; give one")
    without_gpu = ["kernels"] if args.interpret else ["rotation", "quantizer"] if args.cpu else []
    if without_gpu and set(args.steps) - set(without_gpu):
        parser.error(f"{'--interpret' if args.interpret else '--cpu'} runs {' and '.join(without_gpu)} only")
    if objective_kernels.triton is None:
        print("gpu-check: triton is not installed for this Python", file=sys.stderr)
        return 2
    if not without_gpu and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} sees no CUDA GPU; pass --interpret to run the kernels "
              "step in Triton's interpreter, or --cpu for the rotation and quantizer steps", file=sys.stderr)
        return 2
    failed = []
    for name in args.steps or without_gpu or list(STEPS):
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        result = STEPS[name]("cpu" if without_gpu else "cuda")
        result |= {"seconds": round(time.perf_counter() - start, 1), "environment": environment()}
        merge(args.out, name, result)
        if not result.get("passed", True):
            failed.append(name)
    print(f"results: {args.out}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all passed"))
    return 1 if failed else 0


def environment() -> dict:
    """What the numbers depend on."""
    info = {"python": platform.python_version(), "torch": torch.__version__,
            "triton": objective_kernels.triton.__version__, "gpu": None}
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


def milliseconds(*functions: Callable, repeats: int = REPEATS) -> list[float]:
    """Median time of each function on the GPU, timed in turn so that a drifting clock hits all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 3):
        for function, series in zip(functions, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            if repeat >= 3:  # the first calls compile and warm up
                series.append(start.elapsed_time(end))
    return [sorted(series)[repeats // 2] for series in times]


def random_problem(n: int, d: int, m: int, dtype: torch.dtype, device: str, *, weighted: bool,
                   transposed: bool = False, seed: int = 0):
    """Weights of a trained model's size, a rotation's columns and, on demand, row weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((d, n) if transposed else (n, d), generator=generator) * 0.02
    square = torch.randn(max(d, m), max(d, m), generator=generator).to(device)
    r = torch.linalg.qr(square)[0][:d, :m].contiguous()
    weights = torch.rand(n, generator=generator) * 4 if weighted else None
    x = x.to(device, dtype)
    return (x.T if transposed else x), r.to(dtype), None if weights is None else weights.to(device)


def kernels_step(device: str) -> dict:
    """Every Triton kernel against its twin over a grid of shapes."""
    rows = [*objective_errors(device), *hadamard_errors(device)]
    worst: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["error"]):
        worst[row["kernel"], row["case"]] = row
    failed = [row for row in rows if row["error"] > row["tolerance"]]
    print(f"{len(rows)} cases; the worst of each kind:")
    print_table(list(worst.values()))
    for row in failed:
        print(f"OUT OF TOLERANCE {row}")
    return {"passed": not failed, "device": device, "cases": len(rows),
            "worst": [json_row(row) for row in worst.values()], "failed": [json_row(row) for row in failed]}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; infinite if anything is not finite."""
    norm = torch.linalg.vector_norm
    error = float(norm(actual.double() - expected.double()) / norm(expected.double()))
    return error if math.isfinite(error) else math.inf


def json_row(row: dict) -> dict:
    """The row with an infinite error as text: JSON has no infinity."""
    return row if math.isfinite(row["error"]) else {**row, "error": "inf"}


def objective_errors(device: str) -> list[dict]:
    """Relative errors of `fourth_power_triton`, the worse of loss and gradient per case."""
    shapes = [(1, 1, 1), (37, 24, 24), (130, 65, 65), (150, 96, 40)]
    if device == "cuda":
        shapes += [(1000, 576, 576), (3000, 64, 64), (4099, 896, 896), (2048, 4096, 4096)]
    cases = [("float32", "ieee", True), ("float32", "ieee", False), ("float32", "tf32", True),
             ("bfloat16", "ieee", True)]
    rows = []
    for n, d, m in shapes:
        for dtype, precision, fused in cases:
            tolerance = TOLERANCES[f"{dtype} {precision}"] * max(1, d / 256) ** 0.5
            if device == "cpu" and dtype == "bfloat16":
                tolerance = INTERPRETER_BF16
            for weighted, transposed in ((False, False), (True, False), (True, True)):
                x, r, weights = random_problem(n, d, m, getattr(torch, dtype), device, weighted=weighted,
                                               transposed=transposed)
                # float32's twin in float64: the errors are then the kernel's alone.
                wide = (x.double(), r.double()) if dtype == "float32" else (x, r)
                loss, grad = objective_kernels.fourth_power_torch(*wide, weights)
                loss2, grad2 = objective_kernels.fourth_power_triton(
                    x, r, weights, input_precision=precision, fused=fused)
                error = max(relative_error(loss2, loss), relative_error(grad2, grad))
                rows.append({"kernel": "fourth_power", "error": error, "tolerance": tolerance,
                             "case": f"{dtype} {precision} {'fused' if fused else 'separate'}",
                             "shape": f"{n}x{d}x{m}{' w' * weighted}{' T' * transposed}"})
    return rows


def hadamard_errors(device: str) -> list[dict]:
    """Largest |Δ| of `block_hadamard_triton` over the largest output, per case."""
    rows = []
    for block in hadamard_kernels.TRITON_BLOCKS:
        for shape in ((1, block), (3, 5, 3 * block), (4097 if device == "cuda" else 37, block)):
            # Two float32 sums in different orders; one unit in the last place of a half type
            # where a sum falls between two of its values.
            for dtype, tolerance in (("float32", 1e-6), ("float16", 2**-10), ("bfloat16", 2**-7)):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(block))
                x = x.to(device, getattr(torch, dtype))
                expected = hadamard_kernels.block_hadamard_torch(x, block).float()
                actual = hadamard_kernels.block_hadamard_triton(x, block).float()
                error = float((actual - expected).abs().max() / expected.abs().max())
                error = error if math.isfinite(error) else math.inf
                rows.append({"kernel": "block_hadamard", "error": error, "tolerance": tolerance,
                             "case": f"{dtype} {block}", "shape": "x".join(map(str, shape))})
    return rows


def objective_step(device: str) -> dict:
    """One gradient of the objective: kernel against eager torch, at Llama-3.1-8B's shapes."""
    rows = []
    fused = objective_kernels.fourth_power_triton
    previous = torch.get_float32_matmul_precision()
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")):
        # The same arithmetic in every column.
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        for name, (n, d) in LLAMA_8B.items():
            problem = random_problem(n, d, d, dtype, device, weighted=True)
            functions = {"eager": partial(eager, *problem),
                         "fused": partial(fused, *problem, input_precision=precision, fused=True)}
            if dtype == torch.float32:
                functions["separate"] = partial(fused, *problem, fused=False)
            times = dict(zip(functions, milliseconds(*functions.values()), strict=True))
            row = {"matrices": name, "n": n, "d": d, "dtype": str(dtype).removeprefix("torch."),
                   "precision": precision, "eager_ms": times["eager"],
                   "eager_tflops": 4e-9 * n * d * d / times["eager"]}
            for kernel in ("fused", "separate"):
                taken = times.get(kernel)
                row |= {f"{kernel}_ms": taken, f"{kernel}_speedup": times["eager"] / taken if taken else None}
            rows.append(row)
    torch.set_float32_matmul_precision(previous)
    print_table(rows)
    return {"rows": rows, "repeats": REPEATS, "statistic": "median"}


def eager(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor):
    """The objective as one would write it in torch, in the inputs' dtype."""
    y = x @ r
    squared = y * y
    loss = (squared.square().sum(1, dtype=torch.float32) * weights).sum(dtype=torch.float64)
    return loss, 4 * (x.T @ (squared * y * weights[:, None].to(y.dtype)))


def hadamard_step(device: str) -> dict:
    """Bytes moved per second by the block transform, against torch's twin and a plain copy."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for block in hadamard_kernels.TRITON_BLOCKS:
            x = torch.randn(8192, 14336, device=device, dtype=dtype)
            y = torch.empty_like(x)
            kernel_ms, twin_ms, copy_ms = milliseconds(
                partial(hadamard_kernels.block_hadamard_triton, x, block),
                partial(hadamard_kernels.block_hadamard_torch, x, block), partial(y.copy_, x))
            moved = 2e-6 * x.numel() * x.element_size()  # read and written once, in GB per millisecond
            rows.append({"dtype": str(dtype).removeprefix("torch."), "block": block, "kernel_ms": kernel_ms,
                         "torch_ms": twin_ms, "copy_ms": copy_ms, "kernel_gb_s": moved / kernel_ms,
                         "speedup": twin_ms / kernel_ms, "of_copy": copy_ms / kernel_ms})
    print_table(rows)
    return {"rows": rows, "repeats": REPEATS, "statistic": "median"}


def rotation_step(device: str) -> dict:
    """See gpu_road.py."""
    return with_tables(gpu_road.rotation_step(device))


def quantizer_step(device: str) -> dict:
    """See gpu_road.py."""
    return with_tables(gpu_road.quantizer_step(device))


def with_tables(result: dict) -> dict:
    """`result`, its checks and timings printed."""
    print_table(result["checks"])
    print_table(result["timings"])
    return result


# Name to function(device) -> dict for the JSON; `passed: False` in it fails the run.
STEPS: dict[str, Callable[[str], dict]] = {
    "kernels": kernels_step,
    "objective": objective_step,
    "hadamard": hadamard_step,
    "rotation": rotation_step,
    "quantizer": quantizer_step,
}

if __name__ == "__main__":
    sys.exit(main())
