"""OptRot+'s closed-form gradients against autograd in float64, and its loss against GPTQ itself."""

from types import SimpleNamespace

import pytest
import torch

from optrot_edge.quantize.gptq import gptq, prepare_hessian
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations import layer_loss
from optrot_edge.rotations.fuse import READS
from optrot_edge.rotations.grid_loss import block_loss, column_cost, plain_loss
from optrot_edge.rotations.layer_loss import LayerProblem, LayerVariables, LossForm

HIDDEN, DIM, HEADS, KV, FF, GROUP = 32, 8, 6, 2, 48, 8
CONFIG = SimpleNamespace(num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=DIM, query_groups=HEADS // KV)
SHAPES = {"q_proj": (HEADS * DIM, HIDDEN), "k_proj": (KV * DIM, HIDDEN), "v_proj": (KV * DIM, HIDDEN),
          "o_proj": (HIDDEN, HEADS * DIM), "gate_proj": (FF, HIDDEN), "up_proj": (FF, HIDDEN),
          "down_proj": (HIDDEN, FF)}


def covariance(width, generator):
    """An anisotropic covariance."""
    x = torch.randn(width, 3 * width, dtype=torch.float64, generator=generator)
    x[:4] *= 3
    return x @ x.T / (3 * width)


def orthogonal(generator, *shape):
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64, generator=generator))[0]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def problem(generator, form, r4_block=None):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    layer = {f"{name}.weight": draw(*shape) / 5 for name, shape in SHAPES.items()}
    layer |= {f"{norm}.weight": draw(HIDDEN).abs() + 0.5 for norm in READS}
    covariances = {"attn": covariance(HIDDEN, generator), "mlp": covariance(HIDDEN, generator),
                   "o": covariance(HEADS * DIM, generator)}
    sensitivity = {name: draw(shape[0]).abs() + 0.2 for name, shape in SHAPES.items()}
    return LayerProblem(layer, covariances, draw(FF).abs() + 0.1, sensitivity, CONFIG, form, r4_block)


def point(generator, r1=True, r2=True):
    draw = lambda size: 0.3 * torch.randn(size, dtype=torch.float64, generator=generator)  # noqa: E731
    scales = {"attn_norm": draw(HIDDEN), "mlp_norm": draw(HIDDEN), "value": draw(KV * DIM), "up": draw(FF)}
    return LayerVariables(orthogonal(generator, HIDDEN, HIDDEN) if r1 else None,
                          orthogonal(generator, KV, DIM, DIM) if r2 else None, scales)


def differentiable_cost(hessian, damp):
    """The diagonal of (I+U)⁻¹ H (I+U)⁻ᵀ by way of H's inverse, as GPTQ goes, written so that autograd can follow."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    h = hessian[order][:, order]
    damped = h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverse = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    inverse = inverse / inverse.diagonal()[:, None]
    cost = torch.zeros_like(h[0]).scatter(0, order, (inverse @ h @ inverse.T).diagonal())
    return SimpleNamespace(cost=cost, gradient=lambda weights: torch.zeros_like(hessian))


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("objective", ["grid", "plain"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("r1", "r2"), [(True, True), (False, True), (True, False), (False, False)])
def test_gradients_equal_autograd(generator, monkeypatch, objective, affine, r1, r2):
    form = LossForm(GROUP, affine, 0.1, objective)
    subject, at = problem(generator, form), point(generator, r1, r2)
    with torch.no_grad():
        found = subject.evaluate(at)
    terms = []

    def recorded(weight, row_weights, cost):
        result = form(weight, row_weights, cost)
        terms.append(result[0])
        return result

    monkeypatch.setattr(layer_loss, "column_cost", differentiable_cost)
    subject.form = type("Recorded", (), {"damp": 0.1, "group_size": GROUP, "__call__": lambda _, *a: recorded(*a)})()
    grown = [None if t is None else t.clone().requires_grad_() for t in (at.r1, at.r2, *at.log_scales.values())]
    subject.evaluate(LayerVariables(grown[0], grown[1], dict(zip(at.log_scales, grown[2:], strict=True))))
    loss = sum(terms)
    loss.backward()
    assert sum(found.losses.values()) == pytest.approx(float(loss.detach()), rel=1e-12)
    ours = [found.r1, found.r2, *[found.log_scales[name] for name in at.log_scales]]
    for mine, variable in zip(ours, grown, strict=True):
        if variable is not None:
            torch.testing.assert_close(mine, variable.grad, rtol=1e-10, atol=1e-12 * float(variable.grad.abs().max()))


def test_undamped_column_cost_is_that_of_gptq(generator):
    h = covariance(24, generator)
    torch.testing.assert_close(column_cost(h, 0).cost, prepare_hessian(h, damp=0).column_cost, rtol=1e-10, atol=0)


@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_column_cost_predicts_what_gptq_leaves(generator, damp):
    """On the covariance as it is; D of the damped one would count the damping as loss."""
    h, weight = covariance(64, generator), torch.randn(2000, 64, dtype=torch.float64, generator=generator)
    grid, prepared = Grid("q8_0"), prepare_hessian(h, damp=damp)
    params = grid.fit(weight, h.diagonal())
    error = grid.decode(gptq(weight, prepared, grid, params), params) - weight
    noise = (params.scales.double().repeat_interleave(32, dim=1).square() / 12).sum(0)
    left = float(((error @ h) * error).sum())
    assert left == pytest.approx(float(noise @ column_cost(h, damp).cost), rel=0.12)
    assert left < (1 - damp / 2) * float(noise @ prepared.column_cost)


def test_drawn_rows_and_columns_are_unbiased(generator):
    subject, at = problem(generator, LossForm(GROUP, True, 0.1)), point(generator)
    exact = subject.evaluate(at)
    drawn = [subject.evaluate(at, 16, generator) for _ in range(400)]
    for kind in ("attn", "mlp", "down"):
        assert sum(d.losses[kind] for d in drawn) / 400 == pytest.approx(exact.losses[kind], rel=0.05)
    mean = sum(d.r1 for d in drawn) / 400
    assert float((mean - exact.r1).norm() / exact.r1.norm()) < 0.1


@pytest.mark.parametrize("affine", [True, False])
def test_block_loss_does_not_change_with_the_scale_of_a_row(generator, affine):
    """A row has its own steps, so scaling it scales its loss by the square: what "value" scales rely on."""
    weight = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    ones, cost = torch.ones(6, dtype=torch.float64), torch.rand(16, dtype=torch.float64, generator=generator)
    scale = torch.tensor([1, 2, 3, 0.5, 1, 7], dtype=torch.float64)
    loss = block_loss(weight, ones, cost, 8, affine=affine)[0]
    scaled = block_loss(scale[:, None] * weight, ones / scale.square(), cost, 8, affine=affine)[0]
    assert float(scaled) == pytest.approx(float(loss), rel=1e-12)


def test_plain_form_is_the_published_product(generator):
    weight = torch.randn(6, 16, dtype=torch.float64, generator=generator)
    cost = torch.rand(16, dtype=torch.float64, generator=generator)
    loss = plain_loss(weight, torch.full((6,), 2.0, dtype=torch.float64), cost)[0]
    assert float(loss) == pytest.approx(2 * float(cost.sum()) * float(weight.pow(4).sum().sqrt()), rel=1e-12)


def test_r4_takes_the_place_of_the_up_scales(generator):
    subject, at = problem(generator, LossForm(GROUP, True, 0.1), r4_block=16), point(generator)
    del at.log_scales["up"]
    assert "up" not in subject.evaluate(at).log_scales
