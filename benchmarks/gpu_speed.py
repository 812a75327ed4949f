"""Steps of gpu_check.py that time each kernel against what torch offers for the same work.

The other side is cuBLAS with elementwise operations, the same under torch.compile, and for the transform a
dense product and Dao's fast_hadamard_transform where it is installed. On device "cpu" shapes shrink, kernels run
in Triton's interpreter, and only the steps' own code is checked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial

import torch
from gpu_kernels import random_problem

from optrot_edge.kernels.fake_quant import fake_quantize_torch, fake_quantize_triton
from optrot_edge.kernels.fourth_power import fourth_power_triton
from optrot_edge.kernels.hadamard import block_hadamard_torch, block_hadamard_triton
from optrot_edge.rotations.hadamard import hadamard

# Rows and columns of the weights of Llama-3.1-8B as the objective reads them: `Y = X R1`.
LLAMA_8B = {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up, down": (14336, 4096),
            "a step's draw": (20_000, 4096)}
TINY = {"tiny": (40, 32)}
# Blocks as (m, 2^k): R3 and R4 of common models, the largest, and m·2^k for 12288, 5120 and 14336 channels.
BLOCKS = ((1, 64), (1, 128), (1, 256), (1, 512), (1, 1024), (1, 4096), (1, 16384), (1, 32768),
          (12, 1024), (20, 256), (28, 512))
COMPILED_BLOCKS = (128, 4096)  # torch.compile takes long over the twin's many stages
DENSE_BLOCK = 4096  # largest block that is also timed as one dense product
AHEAD = 2_000_000  # cycles, about a millisecond: many times what it takes to launch a kernel
REPEATS = 15  # timed calls per function; their median is reported


def milliseconds(device: str, functions: dict[str, Callable | None], repeats: int = REPEATS, *,
                 ahead: bool = True) -> tuple[dict, dict]:
    """Median time of each function, timed in turn so that a drifting clock hits all alike, and what failed.

    A function that raises (no compiler, no memory) or is None has no time. `ahead`: see `once`.
    """
    if device == "cpu":
        repeats, warm = 1, 0
    else:
        warm = 3  # the first calls compile and warm up
    times: dict[str, list[float]] = {name: [] for name, function in functions.items() if function is not None}
    failures: dict[str, str] = {}
    for repeat in range(repeats + warm):
        for name in list(times):
            try:
                taken = once(device, functions[name], ahead)
            except Exception as error:  # any contender may be missing its compiler; the kernels' own step is strict
                if name.startswith("kernel"):
                    raise
                failures[name] = f"{type(error).__name__}: {error}"[:300]
                del times[name]
                continue
            if repeat >= warm:
                times[name].append(taken)
    return {name: sorted(times[name])[repeats // 2] if name in times else None for name in functions}, failures


def once(device: str, function: Callable, ahead: bool = True) -> float:
    """Milliseconds of one call. `ahead`: the GPU is kept busy until the host has launched the first kernels, so that
    only their own time counts; without, for functions of many launches, what the host takes counts too."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead:
        torch.cuda._sleep(AHEAD)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def compiled(device: str, function: Callable) -> Callable | None:
    """`function` under torch.compile, from a clean slate; None where there is no GPU to compile for."""
    if device == "cpu":
        return None
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def timed_row(head: dict, times: dict, baseline: str, kernel: str) -> dict:
    """`head`, every time as NAME_ms, and how often faster than `baseline` the kernel is."""
    row = head | {f"{name}_ms": taken for name, taken in times.items()}
    return row | {f"over_{baseline}": times[baseline] / times[kernel] if times.get(baseline) else None}


def result(device: str, rows: list[dict], failures: dict) -> dict:
    """A timing step's result."""
    for name, text in failures.items():
        print(f"{name} did not run: {text}")
    return {"device": device, "rows": rows, "repeats": REPEATS if device == "cuda" else 1, "statistic": "median",
            "did_not_run": failures}


def eager(x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor):
    """The objective as one would write it in torch, in the inputs' dtype."""
    y = x @ r
    squared = y * y
    loss = (squared.square().sum(1, dtype=torch.float32) * weights).sum(dtype=torch.float64)
    return loss, 4 * (x.T @ (squared * y * weights[:, None].to(y.dtype)))


def objective_step(device: str) -> dict:
    """One loss and gradient of the objective: kernels against cuBLAS and elementwise operations."""
    rows, failures = [], {}
    for dtype, precision in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "bf16")):
        with products_in("tf32" if precision == "tf32" else "float32"):  # the same in every column
            for name, (n, d) in (LLAMA_8B if device == "cuda" else TINY).items():
                problem = random_problem(n, d, d, dtype, device, weighted=True)
                kernel = partial(fourth_power_triton, *problem, precision=precision)
                fast = compiled(device, eager)
                functions = {"eager": partial(eager, *problem),
                             "compiled": None if fast is None else partial(fast, *problem),
                             "kernel_fused": partial(kernel, fused=True),
                             "kernel_separate": partial(kernel, fused=False) if precision == "ieee" else None}
                times, failed = milliseconds(device, functions)
                failures |= failed
                chosen = "kernel_separate" if precision == "ieee" else "kernel_fused"
                row = timed_row({"matrices": name, "n": n, "d": d, "precision": precision}, times, "eager", chosen)
                rows.append(row | {"tflops": 4e-9 * n * d * d / times[chosen]})
    return result(device, rows, failures)


@contextlib.contextmanager
def products_in(precision: str):
    """torch's products of float32 matrices in "tf32" or "float32", and afterwards as they were."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


def dao_transform(block: int, order: int) -> Callable | None:
    """fast_hadamard_transform's function for this block, if that package is installed and takes it."""
    try:
        from fast_hadamard_transform import hadamard_transform
    except ImportError:
        return None
    return partial(hadamard_transform, scale=block**-0.5) if order == 1 and block <= 32768 else None


def hadamard_step(device: str) -> dict:
    """The block transform against torch's twin, a dense product, Dao's kernel and a plain copy."""
    rows, failures = [], {}
    elements = 2**27 if device == "cuda" else 2**13
    for dtype in (torch.float32, torch.bfloat16):
        for order, power in BLOCKS if device == "cuda" else ((1, 64), (12, 4)):
            block = order * power
            core = None if order == 1 else hadamard(order)[0].to(device, torch.float32)
            x = torch.randn(max(1, elements // block), block, device=device, dtype=dtype)
            y = x.clone()
            dense, dao = None, dao_transform(block, order)
            if block <= DENSE_BLOCK:
                eye = torch.eye(block, device=device)
                dense = partial(torch.matmul, x, block_hadamard_torch(eye, block, core=core).to(dtype))
            twin = partial(block_hadamard_torch, block=block, core=core)
            fast = compiled(device, twin) if block in COMPILED_BLOCKS else None
            functions = {"kernel": partial(block_hadamard_triton, x, block, core=core),
                         "kernel_in_place": partial(block_hadamard_triton, y, block, core=core, out=y),
                         "twin": partial(twin, x), "compiled": None if fast is None else partial(fast, x),
                         "dense": dense, "dao": None if dao is None else partial(dao, x), "copy": partial(y.copy_, x)}
            times, failed = milliseconds(device, functions)
            failures |= failed
            row = timed_row({"dtype": str(dtype)[6:], "block": f"{order}x{power}"}, times, "twin", "kernel")
            moved = 2e-6 * x.numel() * x.element_size()  # read and written once, in GB per millisecond
            rows.append(row | {"gb_s": moved / times["kernel"], "of_copy": times["copy"] / times["kernel"]})
    return result(device, rows, failures)


def fake_quant_step(device: str) -> dict:
    """Per-token fake quantisation against torch's twin, eager and compiled, and a plain copy."""
    rows, failures = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for bits in (8, 4):
            for tokens, width in ((16384, 4096), (8192, 14336)) if device == "cuda" else ((5, 96),):
                x = torch.randn(tokens, width, device=device, dtype=dtype)
                y = x.clone()
                fast = compiled(device, fake_quantize_torch)
                functions = {"kernel": partial(fake_quantize_triton, x, bits),
                             "kernel_in_place": partial(fake_quantize_triton, y, bits, out=y),
                             "twin": partial(fake_quantize_torch, x, bits),
                             "compiled": None if fast is None else partial(fast, x, bits), "copy": partial(y.copy_, x)}
                times, failed = milliseconds(device, functions)
                failures |= failed
                row = timed_row({"dtype": str(dtype)[6:], "bits": bits, "tokens": tokens, "width": width}, times,
                                "twin", "kernel")
                moved = 2e-6 * x.numel() * x.element_size()
                rows.append(row | {"gb_s": moved / times["kernel"], "of_copy": times["copy"] / times["kernel"]})
    return result(device, rows, failures)
