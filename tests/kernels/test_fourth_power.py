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
    with pytest.raises(ValueError, match="input_precision 'fp8'"):
        fourth_power_torch(torch.ones(1, 2), torch.eye(2), input_precision="fp8")


@needs_triton
@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float32, False),
                                              (torch.bfloat16, True)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (37, 24, 24), (130, 65, 65), (70, 40, 200)])
def test_triton_equals_the_twin(n, d, m, transposed, weighted, dtype, fused):
    x, r, weights = problem(n, d, m, dtype, weighted=weighted, transposed=transposed, device=DEVICE)
    loss, grad = fourth_power_triton(x, r, weights, fused=fused)
    expected_loss, expected = fourth_power_torch(x, r, weights)
    assert loss.dtype == torch.float64 and grad.dtype == torch.float32
    assert relative(loss, expected_loss) < 1e-6
    # The interpreter truncates to bfloat16, GPUs round: half a unit in the last place on average.
    truncation = 2**-8 * 1.5 if DEVICE == "cpu" else 1e-4
    assert relative(grad, expected) < (1e-6 if dtype == torch.float32 else truncation)


@needs_triton
def test_triton_takes_strided_views():
    """Every other row and a slice of columns, as a streamed reader may hand over."""
    base, r, _ = problem(80, 90, 30, torch.float32, weighted=False, device=DEVICE)
    x, r = base[::2, 11:41], r[:30]
    for fused in (True, False):
        loss, grad = fourth_power_triton(x, r, fused=fused)
        expected_loss, expected = fourth_power_torch(x.contiguous(), r.contiguous())
        assert relative(loss, expected_loss) < 1e-6 and relative(grad, expected) < 1e-6


@needs_triton
def test_backend_argument_chooses():
    x, r, weights = problem(20, 16, 16, torch.float32, weighted=True, device=DEVICE)
    chosen = fourth_power(x, r, weights, backend="triton")
    assert torch.equal(chosen[1], fourth_power_triton(x, r, weights)[1])
    automatic = fourth_power(x, r, weights)
    expected = fourth_power_triton if DEVICE == "cuda" else fourth_power_torch
    assert torch.equal(automatic[1], expected(x, r, weights)[1])


@needs_triton
def test_triton_refuses_float64_and_unfused_bfloat16():
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        fourth_power_triton(torch.ones(2, 2, device=DEVICE).double(), torch.eye(2, device=DEVICE).double())
    with pytest.raises(ValueError, match="float32 only"):
        fourth_power_triton(torch.ones(2, 2, device=DEVICE).bfloat16(),
                            torch.eye(2, device=DEVICE).bfloat16(), fused=False)
