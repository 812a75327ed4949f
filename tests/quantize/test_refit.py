"""Scales fitted again after GPTQ: least squares, at stored precision, and never a loss."""

from __future__ import annotations

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.refit import gptq_with_refits, refit, row_losses
from optrot_edge.recipe import Recipe
from tests.quantize.test_gptq import problem

GRIDS = ["q4_0", "q4_1", "q8_0", "int3-g64-zero", "int4-g64-min", "mlx-4bit-g64-bf16", "iq4_nl", "iq4_xs", "q2_k",
         "q3_k", "q4_k", "q6_k"]


def make(name, seed=3, rows=12, columns=256):
    weight, hessian = problem(seed, rows=rows, columns=columns)
    grid = Grid(name)
    params = grid.fit(weight, hessian.diagonal())
    prepared = prepare_hessian(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    return weight, hessian, damped.float(), grid, prepared, params, gptq(weight, prepared, grid, params)


def loss_of(weight, hessian, grid, codes, params):
    return row_losses(grid.decode(codes, params) - weight, hessian)


@pytest.mark.parametrize("name", GRIDS)
def test_no_row_loses_and_many_gain(name):
    weight, _, damped, grid, _, params, codes = make(name)
    again = refit(weight, damped, grid, codes, params)
    before, after = (loss_of(weight, damped, grid, codes, p) for p in (params, again))
    assert (after <= before).all() and (after < before).sum() >= len(weight) / 3
    stored = grid.pack(codes, again)  # in the precision that is stored
    assert torch.equal(torch.from_numpy(stored.decode()), grid.decode(codes, again))


@pytest.mark.parametrize("name", ["int4-g64-sym", "int4-g64-min", "int3-g32-zero"])
def test_float_scales_are_the_least_squares(name):
    """With scales in float32 no small move of any scale or min lowers any row's loss."""
    weight, _, damped, grid, _, params, codes = make(name, rows=5)
    weight, damped = weight.double(), damped.double()
    again = refit(weight, damped, grid, codes, params)
    best = loss_of(weight, damped, grid, codes, again)
    for part in ("scales", "offsets") if grid.spec.kind == "min" else ("scales",):
        held = getattr(again, part)
        for block in range(held.shape[1]):
            for step in (-1e-3, 1e-3):
                moved = again.rows(slice(None))
                setattr(moved, part, held.clone())
                getattr(moved, part)[:, block] += step * held[:, block].abs()
                assert (loss_of(weight, damped, grid, codes, moved) > best).all()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k"])
@pytest.mark.parametrize("refits", [1, 3])
def test_gptq_with_refits_beats_gptq(name, refits):
    weight, hessian, damped, grid, prepared, params, codes = make(name)
    plain = loss_of(weight, damped, grid, codes, params)
    once = loss_of(weight, damped, grid, *gptq_with_refits(weight, hessian, prepared, grid, params, 1))
    found = loss_of(weight, damped, grid, *gptq_with_refits(weight, hessian, prepared, grid, params, refits))
    assert (found <= plain * (1 + 1e-6)).all() and (found <= once * (1 + 1e-6)).all()
    assert found.sum() < 0.99 * plain.sum()


@pytest.mark.parametrize(("name", "refits"), [("q4_0", 0), ("mxfp4", 2)])
def test_nothing_to_refit(name, refits):
    weight, hessian, _, grid, prepared, params, codes = make(name)
    found, held = gptq_with_refits(weight, hessian, prepared, grid, params, refits)
    assert torch.equal(found, codes) and held is params


def test_dead_columns_and_empty_blocks():
    """A dead input, a block of dead inputs, a row and a block of zeros: finite, and no worse."""
    weight, hessian = problem(4, rows=6, columns=128)
    for dead in (slice(3, 4), slice(32, 64)):
        hessian[dead] = 0
        hessian[:, dead] = 0
    weight[2] = 0
    weight[:, 64:96] = 0
    for name in ("q4_0", "q4_1"):
        grid, prepared = Grid(name), prepare_hessian(hessian)
        params = grid.fit(weight, hessian.diagonal())
        codes, held = gptq_with_refits(weight, hessian, prepared, grid, params, 2)
        assert held.scales.isfinite().all()
        plain = loss_of(weight, hessian.float(), grid, gptq(weight, prepared, grid, params), params)
        assert loss_of(weight, hessian.float(), grid, codes, held).sum() <= plain.sum()
        assert not grid.decode(codes, held)[2].any()


def test_rows_are_independent(monkeypatch):
    """Chunks of few rows give what all rows together do."""
    weight, _, damped, grid, _, params, codes = make("q4_1")
    whole = refit(weight, damped, grid, codes, params)
    monkeypatch.setattr("optrot_edge.quantize.refit.CHUNK", 5 * 16**2)
    parts = refit(weight, damped, grid, codes, params)
    assert torch.equal(whole.scales, parts.scales) and torch.equal(whole.offsets, parts.offsets)


def test_refits_are_counted_from_zero():
    with pytest.raises(InputError, match="--refits -1"):
        Recipe(refits=-1)
