"""Steps on the orthogonal group, and the checks of options."""

import math

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.kernels.fourth_power import fourth_power
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.options import OptRotOptions
from optrot_edge.rotations.rotation import orthogonality_error
from optrot_edge.rotations.solvers import Descent, cayley_step, newton_schulz_polar, polar_step, skew_gradient


def problem(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, size, generator=generator, dtype=torch.float64) ** 3
    return x, torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.mark.parametrize("size", [2, 7, 32])
def test_steps_descend_and_stay_orthogonal(size):
    x, r = problem(size)
    for update, lr in ((cayley_step, 1.0), (polar_step, 0.01)):
        loss, gradient = fourth_power(x, r)
        moved = update(r, gradient, lr)
        assert float(fourth_power(x, moved)[0]) < float(loss)
        assert orthogonality_error(moved) < (2e-2 if update is cayley_step else 1e-9)


def test_largest_polar_step_is_brought_back():
    x, r = problem(32)
    moved = polar_step(r, fourth_power(x, r)[1], 0.7)
    assert orthogonality_error(moved) < 0.05 and float((moved - r).norm()) > 1


def test_polar_factor_is_roughly_that():
    x, r = problem(32)
    skew = skew_gradient(r, fourth_power(x, r)[1])
    found = newton_schulz_polar(torch.stack([skew, 100 * skew]))
    torch.testing.assert_close(found[0], found[1])  # no scale
    torch.testing.assert_close(found[0], -found[0].T)
    u, values, vh = torch.linalg.svd(skew)
    strong = values > 0.01 * values.norm()
    assert 20 < int(strong.sum()) < 32
    lifted = (u.T @ found[0] @ vh.T).diagonal()
    assert bool((lifted[strong] > 0.65).all()) and bool((lifted < 1.25).all())
    assert bool((lifted[~strong] > 0).all())
    assert not newton_schulz_polar(torch.zeros(3, 3)).any()


def test_momentum_is_nesterovs():
    x, r = problem(8)
    gradient = fourth_power(x, r)[1]
    skew, momentum = skew_gradient(r, gradient), torch.zeros(8, 8, dtype=torch.float64)
    first = polar_step(r, gradient, 0.1, momentum, 0.5)
    torch.testing.assert_close(momentum, skew)
    torch.testing.assert_close(first, polar_step(r, gradient, 0.1))  # 1.5 S has the polar factor of S
    other = fourth_power(x + 1, r)[1]
    moved = polar_step(r, other, 0.1, momentum, 0.5)
    expected = skew_gradient(r, other) + 0.5 * (0.5 * skew + skew_gradient(r, other))
    torch.testing.assert_close(moved, polar_step(r, r @ expected, 0.1))


@pytest.mark.parametrize("solver", ["polar", "cayley"])
def test_a_batch_steps_like_each_alone(solver):
    matrices = torch.stack([problem(6, seed)[1] for seed in range(3)])
    gradients = torch.stack([fourth_power(*problem(6, seed))[1] for seed in range(3)])
    together = Descent(matrices.clone(), OptRotOptions(solver), 0.8)
    parts = Descent(matrices.clone(), OptRotOptions(solver), 0.8)
    for step in range(2):
        together.advance(gradients, step)
        parts.advance(gradients[:1], step, [0])
        parts.advance(gradients[1:], step, [1, 2])
    torch.testing.assert_close(together.matrix, parts.matrix)
    assert not torch.allclose(together.matrix, matrices)


def test_defaults_of_the_solvers():
    polar, cayley = OptRotOptions(), OptRotOptions("cayley")
    assert (cayley.steps, cayley.rows_per_step(576), cayley.step_size(500)) == (1000, None, 1.0)
    assert polar.rows_per_step(576) == 16 * 576 and OptRotOptions(rows=0).rows_per_step(576) is None
    batches = [polar.batch(step, 576) for step in range(polar.steps)]
    assert sum(batches) / polar.steps == pytest.approx(16 * 576) and batches[-1] == pytest.approx(3 * batches[0])
    assert polar.step_size(0) == 0.4 and 0 < polar.step_size(polar.steps - 1) < 1e-3


@pytest.mark.parametrize("fields, named", [
    ({"solver": "adam"}, "adam"), ({"steps": 0}, "step"), ({"rows": -1}, "rows"), ({"objective": "top-5"}, "top-50"),
    ({"tolerance": 1.0}, "tolerance"), ({"tolerance": -0.1}, "tolerance"), ({"target": 0.0}, "target"),
    ({"target": math.nan}, "target"), ({"lr": 0.8}, "step size"), ({"lr": 0.0}, "step size")])
def test_bad_options(fields, named):
    with pytest.raises(InputError, match=named):
        OptRotOptions(**fields)
    if "lr" not in fields:  # which a recipe does not have
        with pytest.raises(InputError, match=named):
            Recipe(rotation="optrot", **{f"optrot_{name}": value for name, value in fields.items()})
