"""Step of gpu_check.py that compares every Triton kernel with its torch twin over a grid of shapes."""

from __future__ import annotations

import math

import torch

from optrot_edge.kernels.fake_quant import fake_quantize_torch, fake_quantize_triton
from optrot_edge.kernels.fourth_power import fourth_power_torch, fourth_power_triton
from optrot_edge.kernels.gptq import solve_block_torch, solve_block_triton
from optrot_edge.kernels.hadamard import block_hadamard_torch, block_hadamard_triton
from optrot_edge.rotations.hadamard import hadamard

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Relative errors (Frobenius) against the twin up to d = 256. Both sides round X and R alike; beyond float32's
# rounding, which grows as √d, tensor cores cut their sums' last bits off, which biases Y by up to 2⁻²³ a step.
# The gradient also has Y³ in bfloat16, alike except where those bits tip it over.
IEEE_TOLERANCE = 1e-6
LOSS_TOLERANCE = 1e-5  # grows as d
GRADIENT_TOLERANCE = 3e-4  # grows as √d
INTERPRETER_LOSS = 1e-6
INTERPRETER_BF16 = 6e-3  # Triton's interpreter truncates to bfloat16, half a unit in the last place on average
# Loss and gradient of reduced precision against float64: what optrot_edge/kernels/fourth_power.py promises.
PRECISION_COST = {"tf32": (3e-4, 4e-3), "bf16": (1e-3, 2e-2)}
# Largest |Δ| over the largest output. Two float32 sums in different orders; one unit in the last place of
# a half type where a sum falls between two of its values.
HADAMARD_TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# Fake quantisation is the same bit for bit, but for the interpreter's bfloat16; a wrong step is 8e-3 or more.
QUANT_TOLERANCE = {torch.float32: 1e-7, torch.float16: 1e-7, torch.bfloat16: 1e-7}
# GPTQ's errors against what its own codes leave, over the range of code values; and the share of codes unlike the
# twin's: sums in another order tip a weight over halfway between two codes now and then, and its row from there on.
SOLVER_TOLERANCE = 3e-6
SOLVER_CODES = 0.03
BLOCKS = tuple(2**k for k in range(1, 16))
CORES = ((12, 1), (12, 64), (12, 1024), (20, 16), (20, 256), (28, 4), (28, 512), (36, 32), (60, 8), (28, 1024))


def kernels_step(device: str) -> dict:
    """Every Triton kernel against its twin over a grid of shapes."""
    rows = [*objective_errors(device), *hadamard_errors(device), *quant_errors(device),
            *solver_errors(device)]
    worst: dict[tuple, dict] = {}
    for row in sorted(rows, key=lambda row: row["error"]):
        worst[row["kernel"], row["case"]] = row
    failed = [row for row in rows if not row["error"] <= row["tolerance"]]
    for row in failed:
        print(f"OUT OF TOLERANCE {row}")
    print(f"{len(rows)} cases; the worst of each kind:")
    return {"passed": not failed, "device": device, "cases": len(rows),
            "worst": [json_row(row) for row in worst.values()], "failed": [json_row(row) for row in failed]}


def json_row(row: dict) -> dict:
    """The row with an infinite error as text: JSON has no infinity."""
    return row if math.isfinite(row["error"]) else {**row, "error": "inf"}


def finite(error: float) -> float:
    """`error`, infinite if it is NaN: NaN sorts nowhere."""
    return error if math.isfinite(error) else math.inf


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; infinite if anything is not finite."""
    norm = torch.linalg.vector_norm
    return finite(float(norm(actual.double() - expected.double()) / norm(expected.double())))


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest |Δ| over the largest |expected|; infinite if anything is not finite."""
    actual, expected = actual.float(), expected.float()
    return finite(float((actual - expected).abs().max() / expected.abs().max()))


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


def twin_bounds(device: str, d: int, precision: str) -> tuple[float, float]:
    """Tolerances of loss and gradient against the twin for rows of `d`."""
    growth = max(1, d / 256)
    if precision == "ieee":
        return IEEE_TOLERANCE * growth**0.5, IEEE_TOLERANCE * growth**0.5
    return (INTERPRETER_LOSS, INTERPRETER_BF16) if device == "cpu" else (LOSS_TOLERANCE * growth,
                                                                         GRADIENT_TOLERANCE * growth**0.5)


def objective_errors(device: str) -> list[dict]:
    """Relative errors of `fourth_power_triton` against its twin, and at large shapes against float64."""
    shapes = [(1, 1, 1), (37, 24, 24), (130, 65, 65), (150, 96, 40), (1200, 48, 48)]
    if device == "cuda":
        shapes += [(1000, 576, 576), (3000, 64, 64), (4099, 896, 896), (2048, 4096, 4096)]
    cases = [("float32", "ieee", True), ("float32", "ieee", False), ("float32", "tf32", True),
             ("float32", "bf16", True), ("bfloat16", "bf16", True)]
    rows = []
    for n, d, m in shapes:
        for dtype, precision, fused in cases:
            for weighted, transposed in ((False, False), (True, False), (True, True)):
                x, r, weights = random_problem(n, d, m, getattr(torch, dtype), device, weighted=weighted,
                                               transposed=transposed)
                # At full precision the twin runs in float64: the errors are then the kernel's alone.
                wide = (x.double(), r.double())
                exact = fourth_power_torch(*wide, weights)
                twin = exact if precision == "ieee" else fourth_power_torch(x, r, weights, precision=precision)
                actual = fourth_power_triton(x, r, weights, precision=precision, fused=fused)
                case = f"{dtype} {precision} {'fused' if fused else 'separate'}"
                shape = f"{n}x{d}x{m}{' w' * weighted}{' T' * transposed}"
                loss_bound, grad_bound = twin_bounds(device, d, precision)
                bounds = [("loss", twin, loss_bound), ("gradient", twin, grad_bound)]
                if precision in PRECISION_COST and dtype == "float32" and n * d > 10_000:
                    loss_cost, grad_cost = PRECISION_COST[precision]
                    slack = INTERPRETER_BF16 if device == "cpu" else 0
                    bounds += [("loss vs float64", exact, loss_cost), ("gradient vs float64", exact, grad_cost + slack)]
                for what, expected, tolerance in bounds:
                    part = 0 if what.startswith("loss") else 1
                    rows.append({"kernel": "fourth_power", "case": f"{case} {what}", "shape": shape,
                                 "error": relative_error(actual[part], expected[part]), "tolerance": tolerance})
    return rows


def hadamard_errors(device: str) -> list[dict]:
    """Errors of `block_hadamard_triton`, and of itself in place, per block and core."""
    rows = []
    for order, power in (*((1, block) for block in BLOCKS), *CORES):
        block = order * power
        core = None if order == 1 else hadamard(order)[0].to(device)
        tokens = 4097 if device == "cuda" and block < 4096 else 37 if block < 1024 else 2
        for shape in ((1, block), (3, 5, 3 * block) if block < 4096 else (3, 3 * block), (tokens, block)):
            for dtype, tolerance in HADAMARD_TOLERANCE.items():
                x = torch.randn(shape, generator=torch.Generator().manual_seed(block)).to(device, dtype)
                expected = block_hadamard_torch(x, block, core=core)
                error = largest_error(block_hadamard_triton(x, block, core=core), expected)
                block_hadamard_triton(x, block, core=core, out=x)
                rows.append({"kernel": "block_hadamard", "case": str(dtype)[6:],
                             "shape": f"{order}x{power} of " + "x".join(map(str, shape)),
                             "error": max(error, largest_error(x, expected)), "tolerance": tolerance})
    return rows


def quant_errors(device: str) -> list[dict]:
    """Errors of `fake_quantize_triton`, the worst of result, result in place and scales."""
    rows = []
    for bits, clip in ((8, 1.0), (4, 1.0), (4, 0.9)):
        for shape in ((1, 1), (3, 5, 77), (131, 128), (4097 if device == "cuda" else 3, 4096), (5, 14336)):
            for dtype, tolerance in QUANT_TOLERANCE.items():
                if device == "cpu" and dtype == torch.bfloat16:
                    tolerance = 2**-7
                x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])).to(device, dtype)
                twin, kernel = (function(x, bits, clip=clip, return_scales=True)
                                for function in (fake_quantize_torch, fake_quantize_triton))
                fake_quantize_triton(x, bits, clip=clip, out=x)
                pairs = (*zip(kernel, twin, strict=True), (x, twin[0]))
                rows.append({"kernel": "fake_quantize", "case": str(dtype)[6:],
                             "shape": f"A{bits} clip {clip} of " + "x".join(map(str, shape)),
                             "error": max(largest_error(*pair) for pair in pairs), "tolerance": tolerance})
    return rows


def solver_problem(columns: int, rows: int, group_size: int, bits: int, codebook: bool, device: str) -> dict:
    """Arguments of `solve_block` for a block of columns in random order."""
    generator = torch.Generator().manual_seed(columns + rows)
    groups = -(-columns // group_size)
    parts = {"residual": torch.randn(columns, rows, generator=generator),
             "feedback": 0.05 * torch.randn(columns, columns, generator=generator),
             "scales": (0.5 + torch.rand(groups, rows, generator=generator)) * 4 / 2**bits,
             "offsets": None if codebook else torch.randn(groups, rows, generator=generator) * 0.2 - 2,
             "group": torch.randperm(columns, generator=generator) // group_size,
             "levels": torch.linspace(-1, 1, 2**bits).mul(2**bits / 2).sinh() / 200 if codebook else None}
    return {name: part if part is None else part.to(device) for name, part in parts.items()} | {"top": 2**bits - 1}


def solver_errors(device: str) -> list[dict]:
    """Errors of `solve_block_triton`: of its own sums, and the share of codes that are not its twin's."""
    cases = [(1, 1, 32, 4, False), (100, 33, 16, 4, False), (128, 45, 64, 8, False), (40, 20, 32, 4, True)]
    if device == "cuda":
        cases += [(128, rows, group, bits, codebook) for rows in (4099, 14336) for group in (16, 32, 64, 128, 576)
                  for bits, codebook in ((2, False), (4, False), (8, False), (4, True))]
    result = []
    for columns, rows, group_size, bits, codebook in cases:
        parts = solver_problem(columns, rows, group_size, bits, codebook, device)
        codes, errors = solve_block_triton(**parts)
        scales = parts["scales"].double()[parts["group"]]
        value = parts["levels"].double()[codes.long()] * scales if codebook else (
            codes * scales + parts["offsets"].double()[parts["group"]])
        owed = parts["feedback"].double().triu(1).T @ errors.double()
        reach = max(float(value.abs().max()), float(errors.abs().max()), 2**bits * float(scales.max()))
        unlike = float((codes != solve_block_torch(**parts)[0]).double().mean())
        row = {"kernel": "solve_block", "shape": f"{columns}x{rows} g{group_size} {bits} bits{' codebook' * codebook}"}
        off = finite(float((parts["residual"] - owed - value - errors).abs().max()) / reach)
        result += [row | {"case": "errors", "error": off, "tolerance": SOLVER_TOLERANCE},
                   row | {"case": "codes unlike the twin's", "error": unlike, "tolerance": SOLVER_CODES}]
    return result
