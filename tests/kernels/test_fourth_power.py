"""The objective's gradient against autograd; the Triton kernel against its twin."""

import pytest
import torch

from optrot_edge.kernels import fourth_power as module
from optrot_edge.kernels.fourth_power import fourth_power, fourth_power_torch, fourth_power_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="triton is not installed")


def problem(n, d, m, dtype, *, weighted, transposed=False, device="cpu"):
    generator = torch.Generator().manual_seed(n * d + m)
    x = torch.randn((d, n) if transposed else (n, d), generator=generator, dtype=torch.float64).to(dtype)
    r = torch.randn(d, m, generator=generator, dtype=torch.float64).to(dtype) * d**-0.5
    weights = torch.rand(n, generator=generator) + 0.5 if weighted else None
    x = x.to(device)
    return (x.T if transposed else x), r.to(device), weights if weights is None else weights.to(device)


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (50, 12, 12), (17, 9, 4), (5000, 8, 8)])
def test_gradient_is_autograds(n, d, m, weighted, transposed):
    x, r, weights = problem(n, d, m, torch.float64, weighted=weighted, transposed=transposed)
    rotation = r.clone().requires_grad_()
    expected = ((x @ rotation) ** 4 * (1 if weights is None else weights[:, None].double())).sum()
    expected.backward()
    loss, grad = fourth_power_torch(x, r, weights)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert relative(loss, expected.detach()) < 1e-13
    assert relative(grad, rotation.grad) < 1e-13


def test_float32_twin_is_close_to_float64():
    x, r, weights = problem(3000, 64, 64, torch.float32, weighted=True)
    loss, grad = fourth_power_torch(x, r, weights)
    loss64, grad64 = fourth_power_torch(x.double(), r.double(), weights)
    assert grad.dtype == torch.float32
    assert relative(loss, loss64) < 1e-7
    assert relative(grad, grad64) < 1e-6


def test_bfloat16_twin_rounds_only_the_cubes():
    x, r, weights = problem(300, 64, 64, torch.bfloat16, weighted=True)
    loss, grad = fourth_power_torch(x, r, weights)
    loss64, grad64 = fourth_power_torch(x.double(), r.double(), weights)
    assert grad.dtype == torch.float32
    assert relative(loss, loss64) < 1e-6
    assert relative(grad, grad64) < 2**-8


@pytest.mark.parametrize(("precision", "loss_bound", "gradient_bound"), [("tf32", 1e-4, 4e-3), ("bf16", 1e-3, 2e-2)])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_reduced_precision_costs(precision, loss_bound, gradient_bound, weighted):
    """The module's stated tolerances, less what tensor cores' sums lose; and that something is rounded at all."""
    x, r, weights = problem(3000, 96, 96, torch.float32, weighted=weighted)
    loss, grad = fourth_power_torch(x, r, weights, precision=precision)
    exact_loss, exact = fourth_power_torch(x.double(), r.double(), weights)
    assert 1e-7 < relative(loss, exact_loss) < loss_bound
    assert 1e-4 < relative(grad, exact) < gradient_bound


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_cubes_of_every_size_count(precision):
    """Rows from 1e-6 to 1, so cubes from 1e-18, weighted to matter alike: no shared exponent, no underflow."""
    x, r, _ = problem(400, 32, 32, torch.float32, weighted=False)
    size = 10 ** -torch.linspace(0, 6, len(x))
    _, expected = fourth_power_torch(x, r, precision=precision)
    for function in (fourth_power_torch, *([fourth_power_triton] if module.triton else [])):
        problem_here = [t.to(DEVICE) for t in (x * size[:, None], r, size**-4)]
        loss, grad = function(*problem_here, precision=precision)
        assert relative(grad.cpu(), expected) < 1e-2
        assert relative(loss.cpu(), fourth_power_torch(x.double(), r.double())[0]) < 1e-3


def test_rounding_to_tf32_is_to_nearest():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-11, 1 + 3 * 2**-11])])
    rounded = module._rounded(x, "tf32")
    fraction, exponent = torch.frexp(x[:4000].double())
    assert torch.equal(rounded[:4000].double(), torch.ldexp((fraction * 2**11).round(), exponent - 11))
    assert rounded[4000:].tolist() == [0.0, -0.0, float("inf"), -float("inf"), 1 + 2**-10, 1 + 2**-9]


def test_no_rows():
    loss, grad = fourth_power(torch.empty(0, 6), torch.eye(6))
    assert loss == 0 and torch.equal(grad, torch.zeros(6, 6))


def test_importance_sampled_rows_are_unbiased():
    """Rows drawn with probability p and weighted 1 / (count p) estimate the whole gradient."""
    x, r, _ = problem(40, 6, 6, torch.float64, weighted=False)
    probability = x.square().sum(1).square()
    probability /= probability.sum()
    _, whole = fourth_power(x, r)
    # The expectation over one draw, taken exactly: each row's gradient times its probability.
    mean = sum(p * fourth_power(x[i:i + 1], r, (1 / p)[None])[1] for i, p in enumerate(probability))
    assert relative(mean, whole) < 1e-12


@pytest.mark.parametrize(("x", "r", "weights", "words"), [
    (torch.ones(3, 4), torch.ones(5, 5), None, "[n, d]"),
    (torch.ones(3), torch.ones(3, 3), None, "[n, d]"),
    (torch.ones(3, 4), torch.ones(4, 4).double(), None, "one dtype"),
    (torch.ones(3, 4).half(), torch.ones(4, 4).half(), None, "float16"),
    (torch.ones(3, 4), torch.ones(4, 4), torch.ones(4), "one per row"),
])
def test_refuses_what_does_not_fit(x, r, weights, words):
    with pytest.raises(ValueError) as error:
        fourth_power(x, r, weights)
    assert words in str(error.value)


def test_refuses_unknown_backend_and_precision():
    with pytest.raises(ValueError, match="backend 'cuda'"):
        fourth_power(torch.ones(1, 2), torch.eye(2), backend="cuda")
    with pytest.raises(ValueError, match="precision 'fp8'"):
        fourth_power(torch.ones(1, 2), torch.eye(2), precision="fp8")
    with pytest.raises(ValueError, match="precision 'ieee' for torch.bfloat16: use bf16"):
        fourth_power(torch.ones(1, 2).bfloat16(), torch.eye(2).bfloat16(), precision="ieee")
    with pytest.raises(ValueError, match="precision 'tf32' for torch.float64: use ieee"):
        fourth_power(torch.ones(1, 2).double(), torch.eye(2).double(), precision="tf32")


@needs_triton
@pytest.mark.parametrize(("dtype", "precision", "fused"), [
    (torch.float32, "ieee", True), (torch.float32, "ieee", False), (torch.float32, "tf32", True),
    (torch.float32, "bf16", True), (torch.bfloat16, "bf16", True)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (37, 24, 24), (130, 65, 65), (70, 40, 200), (1300, 20, 140)])
def test_triton_equals_the_twin(n, d, m, transposed, weighted, dtype, precision, fused):
    x, r, weights = problem(n, d, m, dtype, weighted=weighted, transposed=transposed, device=DEVICE)
    loss, grad = fourth_power_triton(x, r, weights, precision=precision, fused=fused)
    expected_loss, expected = fourth_power_torch(x, r, weights, precision=precision)
    assert loss.dtype == torch.float64 and grad.dtype == torch.float32
    # The loss sums what the registers hold, so that the product's inputs are rounded exactly alike.
    # Tensor cores cut the last bits of their sums off.
    assert relative(loss, expected_loss) < (1e-6 if precision == "ieee" or DEVICE == "cpu" else 1e-5)
    # The interpreter truncates to bfloat16, GPUs round: half a unit in the last place on average.
    truncation = 2**-8 * 1.5 if DEVICE == "cpu" else 3e-4
    assert relative(grad, expected) < (1e-6 if precision == "ieee" else truncation)


@needs_triton
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_triton_takes_strided_views(precision):
    """Every other row and a slice of columns, as a streamed reader may hand over."""
    base, r, _ = problem(80, 90, 30, torch.float32, weighted=False, device=DEVICE)
    x, r = base[::2, 11:41], r[:30]
    for fused in (True, False) if precision == "ieee" else (True,):
        actual = fourth_power_triton(x, r, precision=precision, fused=fused)
        expected = fourth_power_triton(x.contiguous(), r.contiguous(), precision=precision, fused=fused)
        assert relative(actual[0], expected[0]) < 1e-6 and relative(actual[1], expected[1]) < 1e-6


@needs_triton
def test_backend_argument_chooses():
    x, r, weights = problem(20, 16, 16, torch.float32, weighted=True, device=DEVICE)
    chosen = fourth_power(x, r, weights, backend="triton")
    assert torch.equal(chosen[1], fourth_power_triton(x, r, weights, precision="tf32")[1])
    chosen = fourth_power(x, r, weights, backend="torch")
    assert torch.equal(chosen[1], fourth_power_torch(x, r, weights, precision="ieee")[1])
    automatic = fourth_power(x, r, weights)
    expected = fourth_power_triton if DEVICE == "cuda" else fourth_power_torch
    assert torch.equal(automatic[1], expected(x, r, weights)[1])


@needs_triton
def test_triton_refuses_float64_and_unfused_tensor_cores():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        fourth_power_triton(torch.ones(2, 2, device=DEVICE).double(), torch.eye(2, device=DEVICE).double())
    for x, precision in ((torch.ones(2, 2), "tf32"), (torch.ones(2, 2).bfloat16(), None)):
        with pytest.raises(ValueError, match="never written"):
            fourth_power_triton(x.to(DEVICE), torch.eye(2).to(x).to(DEVICE), precision=precision, fused=False)
