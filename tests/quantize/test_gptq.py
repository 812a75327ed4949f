"""GPTQ: against a column-by-column reference, against rounding, and the RTN bound."""

import dataclasses
import math

import pytest
import torch

from optrot_edge.checkpoint import GGUF_GRIDS
from optrot_edge.errors import InputError
from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.statistics import incoherence, matrix_report, output_error


def problem(seed, rows=16, columns=96, rank=24):
    """Weights and the Hessian of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, rank, generator=generator, dtype=torch.float64)
    x = torch.randn(400, rank, generator=generator, dtype=torch.float64) @ mix.T
    x += 0.3 * torch.randn(400, columns, generator=generator, dtype=torch.float64)
    return torch.randn(rows, columns, generator=generator), x.T @ x / len(x)


def reference_gptq(weight, hessian, grid, params, damp=0.01):
    """The textbook loop in float64: one column at a time, the inverse re-conditioned after each."""
    h = hessian.clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    left = h.diagonal().argsort(descending=True, stable=True).tolist()
    w, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    scales, offsets = params.columns()
    while left:
        j, group = left[0], left[0] // grid.spec.group_size
        inverse = torch.linalg.inv(h[left][:, left])
        offset = None if offsets is None else offsets[group]
        q = grid.codes_of(w[:, j], scales[group], offset)
        codes[:, j] = q
        error = (w[:, j] - grid.values_of(q, scales[group], offset)) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0][None, :]
        left = left[1:]
    return codes


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "int3-g32-zero", "iq4_nl", "mxfp4", "q2_k", "iq4_xs"])
def test_codes_equal_the_column_by_column_reference(name):
    for seed, columns in ((0, 256),) if Grid(name).spec.subscales else ((0, 96), (1, 192)):
        w, h = problem(seed, columns=columns)
        grid = Grid(name)
        params = grid.fit(w, h.diagonal())
        assert torch.equal(gptq(w, prepare_hessian(h), grid, params), reference_gptq(w, h, grid, params))


@pytest.mark.parametrize("name", ["int4-g16-sym", "int3-g64-min", "q4_1", "int4-g64-zero"])
@pytest.mark.parametrize("act_order", [True, False])
def test_blocks_and_groups_of_any_size(name, act_order):
    """320 columns: two whole blocks and a half; groups within and across them."""
    w, h = problem(5, rows=7, columns=320)
    w[2] = 0
    w[:, 64:128] = 0  # whole groups of zeros: their scale is 0
    grid = Grid(name)
    params = grid.fit(w, h.diagonal())
    prepared = prepare_hessian(h, act_order=act_order)
    codes = gptq(w, prepared, grid, params)
    if act_order:
        expected = reference_gptq(w, h, grid, params)
        assert torch.equal(codes, expected)
    upper, order = prepared.upper, prepared.order
    damped = h[order][:, order] + 0.01 * h.diagonal().mean() * torch.eye(320, dtype=torch.float64)
    assert (upper @ damped @ upper.T - torch.eye(320, dtype=torch.float64)).abs().max() < 1e-10
    assert torch.equal(upper, upper.triu()) and (upper.diagonal() > 0).all()
    neutral = grid.codes_of(torch.zeros_like(params.scales), params.scales, params.offsets).to(torch.uint8)
    empty = params.scales == 0
    spread = lambda part: part.repeat_interleave(grid.spec.group_size, 1)  # noqa: E731
    assert torch.equal(codes[spread(empty)], spread(neutral)[spread(empty)])


def test_float32_factor_costs_nothing():
    """What a GPU works in: the squared output error stays the same."""
    for seed in range(5):
        w, h = problem(seed, rows=64, columns=192)
        prepared = prepare_hessian(h)
        narrow = dataclasses.replace(prepared, upper=prepared.upper.float())
        for name in ("q4_0", "q4_1", "q8_0"):
            grid = Grid(name)
            params = grid.fit(w, h.diagonal())
            wide, rounded = (output_error((w - grid.decode(gptq(w, p, grid, params), params)).double(), h)
                             for p in (prepared, narrow))
            assert rounded == pytest.approx(wide, rel=5e-3)


@pytest.mark.parametrize("name", ["q4_0", "q4_1"])
def test_gptq_beats_rounding_on_correlated_inputs(name):
    grid = Grid(name)
    for seed in range(50):
        w, h = problem(seed, rows=8)
        params = grid.fit(w, h.diagonal())
        rounded = output_error(w - grid.decode(grid.round(w, params), params), h)
        codes = gptq(w, prepare_hessian(h), grid, params)
        assert output_error(w - grid.decode(codes, params), h) < rounded


@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_gptq_is_never_worse_than_rounding_on_any_grid(name):
    grid = Grid(name)
    for seed in range(4):
        w, h = problem(seed, rows=8, columns=512)
        params = grid.fit(w, h.diagonal())
        rounded = output_error(w - grid.decode(grid.round(w, params), params), h)
        codes = gptq(w, prepare_hessian(h), grid, params)
        assert output_error(w - grid.decode(codes, params), h) < rounded
        assert int(codes.max()) < grid.spec.levels


def test_diagonal_hessian_is_plain_rounding():
    w, h = problem(0)
    grid, diagonal = Grid("q4_1"), h.diagonal().diag()
    params = grid.fit(w, h.diagonal())
    assert torch.equal(gptq(w, prepare_hessian(diagonal), grid, params), grid.round(w, params))


def test_loss_is_sum_of_column_costs():
    """Without clipping the GPTQ loss is Σ_j D_j ‖rounding error of column j‖² (method of OptRot+)."""
    w, h = problem(2)
    grid = Grid("int8-g96-min")
    params = grid.fit(3 * w)  # feedback moves weights: a grid this wide clips none
    prepared = prepare_hessian(h, damp=1e-9)
    decoded = grid.decode(gptq(w, prepared, grid, params), params)
    upper, order = prepared.upper, prepared.order
    feedback = (w.double() - decoded.double())[:, order] @ torch.linalg.inv(upper)  # errors e_j / U_jj per column
    predicted = float((feedback.square()).sum())
    assert output_error((w - decoded).double(), h) == pytest.approx(predicted, rel=1e-5)
    step = params.scales[:, 0].double()
    eta = feedback * upper.diagonal()
    assert float((eta.abs() / step[:, None]).max()) <= 0.5 + 1e-4
    assert float((prepared.column_cost[order] * eta.square().sum(0)).sum()) == pytest.approx(predicted, rel=1e-9)


def test_dead_columns_and_escalation_are_reported():
    w, h = problem(0)
    h[:, 5] = h[5, :] = 0
    prepared = prepare_hessian(h)
    assert int(prepared.dead.sum()) == 1 and prepared.escalations == 0
    grid = Grid("q4_0")
    params = grid.fit(w, h.diagonal())
    decoded = grid.decode(gptq(w, prepared, grid, params), params)
    assert decoded.isfinite().all()
    indefinite = h - 0.05 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    prepared = prepare_hessian(indefinite)
    assert prepared.escalations == 1 and prepared.damp == pytest.approx(0.1)
    with pytest.raises(InputError, match="not positive definite"):
        prepare_hessian(-1e6 * torch.ones(4, 4, dtype=torch.float64) + 2e6 * torch.eye(4, dtype=torch.float64))
    with pytest.raises(InputError, match="non-finite"):
        prepare_hessian(torch.full((4, 4), math.nan))


def paper_rtn(weight, bits):
    """Per-tensor RTN of the paper: levels spread evenly over [−max|W|, max|W|]."""
    top = weight.abs().max()
    step = 2 * top / (2**bits - 1)
    return ((weight + top) / step).round() * step - top


def rtn_bound(weight, hessian, bits):
    """μ_W² λ_max(H) ‖W‖_F² / (2^b − 1)²."""
    largest = float(torch.linalg.eigvalsh(hessian.double())[-1])
    return incoherence(weight) ** 2 * largest * float(weight.double().square().sum()) / (2**bits - 1) ** 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rtn_bound_holds_and_is_tight(bits):
    for seed in range(5):
        w, h = problem(seed)
        assert output_error((w - paper_rtn(w, bits)).double(), h) <= rtn_bound(w, h, bits)
    # Every weight in the middle of an interval, inputs along the signs of the errors: reaches the bound.
    columns = 4096
    step = 2 / (2**bits - 1)
    w = torch.full((1, columns), -1 + step * (2 ** (bits - 1) - 0.5 - 0.5) + 0.4999 * step)
    w[0, 0] = 1.0
    error = w - paper_rtn(w, bits)
    direction = error.sign()
    direction[0, 0] = 0
    h = (direction.T @ direction).double() / columns
    ratio = output_error(error.double(), h) / rtn_bound(w, h, bits)
    assert 0.99 <= ratio <= 1


def test_matrix_report_numbers():
    w, h = problem(3)
    grid = Grid("q4_0")
    params = grid.fit(w, h.diagonal())
    report = matrix_report(w, grid.decode(grid.round(w, params), params), h)
    assert 10 < report["snr_db"] < 40 and report["mu_w"] >= 1 and 2 < report["kurtosis"] < 4
    identical = matrix_report(w, w, None)
    assert identical["snr_db"] is None and identical["relative_mse"] == 0
