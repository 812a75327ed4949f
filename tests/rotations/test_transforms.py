"""Online transforms: products with weights stay, inverses invert, and their matrices are what they say."""

import math

import pytest
import torch

from optrot_edge.rotations.hadamard import random_hadamard
from optrot_edge.rotations.transforms import Butterfly, Hadamard, Kronecker

SIZES = [96, 64, 30, 7]


def made(kind, n, seed=0):
    """A transform away from its start."""
    generator = torch.Generator().manual_seed(seed)
    start = {"hadamard": Hadamard.start, "butterfly": Butterfly.start, "kronecker": Kronecker.start}[kind]
    transform = start(n, generator)
    with torch.no_grad():
        for parameter in transform.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data.double()
    return transform


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["hadamard", "butterfly", "kronecker"])
def test_the_linear_is_unchanged_and_inverses_invert(kind, n):
    transform = made(kind, n)
    x, w = (torch.randn(rows, n, generator=torch.Generator().manual_seed(rows), dtype=torch.float64) for rows in (5, 9))
    torch.testing.assert_close(transform.apply(x) @ transform.weight(w).T, x @ w.T, rtol=0, atol=1e-10)
    torch.testing.assert_close(transform.undo(transform.apply(x)), x, rtol=0, atol=1e-10)
    torch.testing.assert_close(transform.weight_back(transform.weight(w)), w, rtol=0, atol=1e-10)
    matrix = transform.apply(torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(transform.weight_back(w), w @ matrix.T, rtol=0, atol=1e-10)
    if kind != "kronecker":
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", SIZES)
def test_hadamards_are_those_that_fuse_and_share_their_base(n):
    first, second = made("hadamard", n), made("hadamard", n, seed=1)
    matrix, name = random_hadamard(n, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.apply(torch.eye(n, dtype=torch.float64)), matrix, rtol=0, atol=0)
    assert (first.drawn.base is second.drawn.base) == (not name.startswith("dense-fallback"))
    assert not torch.equal(first.drawn.matrix, second.drawn.matrix)


def test_kronecker_is_one():
    transform = made("kronecker", 30)
    assert (len(transform.left), len(transform.right)) == (5, 6)
    matrix = transform.apply(torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(matrix, torch.kron(transform.left, transform.right), rtol=0, atol=1e-12)


def test_butterfly_starts_as_a_hadamard_but_for_signs_and_turns_pairs():
    start = Butterfly.start(16, torch.Generator().manual_seed(0))
    matrix = start.apply(torch.eye(16, dtype=torch.float64)).detach()
    torch.testing.assert_close(matrix.abs(), torch.full((16, 16), 0.25, dtype=torch.float64), rtol=0, atol=1e-6)
    assert start.angles.shape == (4, 8)
    one = Butterfly(torch.zeros(2, 2, dtype=torch.float64), torch.eye(1, dtype=torch.float64))
    one.angles[1, 0] = math.pi / 6  # the second stage pairs channels two apart
    turned = one.apply(torch.tensor([[1.0, 10.0, 0.0, 20.0]], dtype=torch.float64))
    want = torch.tensor([[math.cos(math.pi / 6), 10.0, -0.5, 20.0]], dtype=torch.float64)
    torch.testing.assert_close(turned, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["butterfly", "kronecker"])
@pytest.mark.parametrize("method", ["apply", "undo", "weight", "weight_back"])
def test_gradients_against_finite_differences(kind, method):
    transform = made(kind, 12)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for parameter in transform.parameters:
        parameter.requires_grad_().grad = None
    loss = lambda: (getattr(transform, method)(x) ** 3).sum()  # noqa: E731
    loss().backward()
    for parameter in transform.parameters:
        gradient, place = parameter.grad.flatten(), parameter.numel() // 2
        with torch.no_grad():
            flat = parameter.view(-1)
            flat[place] += 1e-6
            up = float(loss())
            flat[place] -= 2e-6
            down = float(loss())
            flat[place] += 1e-6
        assert float(gradient[place]) == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-6)
