"""The block solver against GPTQ's definition and the grids' own rounding; the Triton kernel against its twin."""

import pytest
import torch

from optrot_edge.kernels import gptq as module
from optrot_edge.kernels.gptq import solve_block, solve_block_torch, solve_block_triton
from optrot_edge.quantize.grids import Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="triton is not installed")
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def problem(columns, rows, group_size, kind, bits=4, *, act_order=True, dtype=torch.float64, seed=0):
    """Arguments of `solve_block`; some scales are 0, and a codebook's are negative in places."""
    generator = torch.Generator().manual_seed(1000 * columns + rows + seed)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    groups = -(-columns // group_size)
    order = torch.randperm(columns, generator=generator) if act_order else torch.arange(columns)
    scales = 0.2 + 0.3 * draw(groups, rows).abs()
    scales[draw(groups, rows) > 1.8] = 0
    top = 2**bits - 1
    levels = torch.tensor(IQ4, dtype=torch.float64) if kind == "codebook" else None
    offsets = {"symmetric": -(2 ** (bits - 1)) * scales, "min": draw(groups, rows) - 2, "codebook": None,
               "zero": -scales * torch.randint(top + 1, scales.shape, generator=generator)}[kind]
    if levels is not None:
        scales = scales * draw(groups, rows).sign() / 40
    parts = {"residual": draw(columns, rows), "feedback": 0.1 * draw(columns, columns), "scales": scales,
             "offsets": offsets, "group": order // group_size, "levels": levels}
    parts = {name: part if part is None else part.to(part.dtype if name == "group" else dtype)
             for name, part in parts.items()}
    return parts | {"top": len(IQ4) - 1 if levels is not None else top}


def to_device(parts):
    return {name: part.to(DEVICE) if isinstance(part, torch.Tensor) else part for name, part in parts.items()}


def values(parts, codes):
    """What the codes decode to [columns, rows]."""
    scales = parts["scales"][parts["group"]]
    if parts["levels"] is not None:
        return parts["levels"][codes.long()] * scales
    return codes * scales + parts["offsets"][parts["group"]]


def by_columns(parts):
    """One column at a time, every later column updated at once, the nearest of all values taken."""
    w, codes = parts["residual"].clone(), torch.zeros(parts["residual"].shape, dtype=torch.uint8)
    errors = torch.zeros_like(w)
    table = torch.arange(parts["top"] + 1).to(w) if parts["levels"] is None else parts["levels"]
    for j in range(len(w)):
        group = parts["group"][j]
        points = table[:, None] * parts["scales"][group]
        points = points if parts["offsets"] is None else points + parts["offsets"][group]
        codes[j] = (points - w[j]).abs().argmin(0)
        errors[j] = w[j] - points.gather(0, codes[j].long()[None])[0]
        w[j + 1:] -= parts["feedback"][j, j + 1:, None] * errors[j]
    return codes, errors


KINDS = ("symmetric", "min", "zero", "codebook")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("columns", "rows", "group_size"), [(1, 1, 32), (40, 7, 16), (128, 33, 32), (200, 5, 64)])
def test_twin_follows_the_definition(columns, rows, group_size, kind):
    parts = problem(columns, rows, group_size, kind)
    before = parts["residual"].clone()
    codes, errors = solve_block(**parts)
    expected, expected_errors = by_columns(parts)
    counted = (parts["scales"] != 0)[parts["group"]]  # elsewhere all codes mean the same
    assert codes.dtype == torch.uint8 and torch.equal(codes[counted], expected[counted])
    assert (errors - expected_errors).abs().max() < 1e-12
    assert torch.equal(parts["residual"], before)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0", "int3-g32-zero", "int2-g32-sym"])
def test_without_feedback_it_rounds_as_the_grid_does(name):
    """The same codes as Grid.codes_of, with the offset that gptq() hands over."""
    grid = Grid(name)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    scales, offsets = grid.fit(weight).columns()
    residual, group = weight.T.double().contiguous(), torch.arange(64) // grid.spec.group_size
    codes, errors = solve_block(residual, torch.zeros(64, 64).double(), scales,
                                grid.values_of(torch.zeros_like(scales), scales, offsets), group, top=grid.top)
    there = None if offsets is None else offsets[group]
    expected = grid.codes_of(residual, scales[group], there)
    assert torch.equal(codes, expected.to(torch.uint8))
    assert torch.allclose(errors, residual - grid.values_of(expected, scales[group], there), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_twin_is_close_to_float64(kind):
    wide = problem(96, 20, 32, kind)
    narrow = {name: part.float() if torch.is_tensor(part) and part.is_floating_point() else part
              for name, part in wide.items()}
    codes, errors = solve_block_torch(**narrow)
    expected, expected_errors = solve_block_torch(**wide)
    assert errors.dtype == torch.float32 and torch.equal(codes, expected)
    assert (errors - expected_errors).abs().max() < 1e-5


@needs_triton
@pytest.mark.parametrize(("columns", "rows", "group_size", "kind", "bits", "act_order"), [
    (1, 1, 32, "symmetric", 4, True), (17, 33, 16, "min", 4, True), (128, 32, 32, "symmetric", 8, True),
    (100, 45, 64, "zero", 3, True), (128, 5, 576, "min", 2, False), (64, 31, 128, "zero", 8, False),
    (48, 40, 16, "codebook", 4, True), (20, 3, 32, "codebook", 4, False)])
def test_triton_equals_the_twin(columns, rows, group_size, kind, bits, act_order):
    parts = to_device(problem(columns, rows, group_size, kind, bits, act_order=act_order, dtype=torch.float32))
    codes, errors = solve_block_triton(**parts)
    expected, expected_errors = solve_block_torch(**parts)
    # Sums in another order may tip a weight over halfway between two codes, and its row from there on.
    same = (codes == expected).all(0)
    # float32 of weights counted from code 0, grown by feedback; an error in the feedback would be 0.01 or more.
    bound = 3e-6 * max(float(errors.abs().max()), 2 ** bits * float(parts["scales"].abs().max()))
    assert same.double().mean() > 0.95
    assert (errors - expected_errors)[:, same].abs().max() < bound
    # Whatever was chosen, the errors are those of its codes.
    owed = parts["feedback"].double().triu(1).T @ errors.double()
    assert (parts["residual"] - owed - values(parts, codes) - errors).abs().max() < 2 * bound


@needs_triton
def test_triton_takes_a_strided_feedback_and_nothing():
    parts = to_device(problem(24, 9, 16, "min", dtype=torch.float32))
    expected = solve_block_triton(**parts)
    wide = torch.randn(24, 50, device=DEVICE)
    wide[:, :24] = parts["feedback"]
    for feedback in (wide[:, :24], parts["feedback"].T.contiguous().T):
        actual = solve_block_triton(**parts | {"feedback": feedback})
        assert all(map(torch.equal, actual, expected))
    none = {name: part[:, :0] if name in ("residual", "scales", "offsets") else part for name, part in parts.items()}
    assert [tuple(part.shape) for part in solve_block_triton(**none)] == [(24, 0), (24, 0)]


@needs_triton
def test_triton_refuses_what_it_does_not_do():
    for columns, dtype in ((8, torch.float64), (129, torch.float32)):
        with pytest.raises(ValueError, match="use solve_block_torch"):
            solve_block_triton(**to_device(problem(columns, 3, 16, "min", dtype=dtype)))


@pytest.mark.parametrize(("changes", "words"), [
    ({"residual": torch.ones(4)}, "columns, rows"), ({"residual": torch.ones(4, 3).half()}, "float16"),
    ({"feedback": torch.ones(4, 3).double()}, "feedback"), ({"group": torch.zeros(3, dtype=torch.int64)}, "group"),
    ({"scales": torch.ones(2, 2).double()}, "scales"), ({"offsets": torch.ones(1, 3).double()}, "offsets"),
    ({"top": 256}, "top 256"), ({"top": 0}, "top 0"), ({"scales": torch.ones(2, 3)}, "scales is torch.float32"),
    ({"levels": torch.arange(16.0).double()}, "no offsets"),
    ({"levels": torch.arange(5.0).double(), "offsets": None}, r"levels \(5,\)")])
def test_refuses_what_does_not_fit(changes, words):
    with pytest.raises(ValueError, match=words):
        solve_block(**problem(4, 3, 2, "min") | changes)
