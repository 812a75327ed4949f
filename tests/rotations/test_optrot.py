"""OptRot: gradient against autograd, descent, orthogonality, seeding, streaming equivalence."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.rotations import optrot
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.objective import (
    fourth_power_batched,
    prepare_layer,
    residual_rows,
    value_rows,
)
from optrot_edge.rotations.optrot import OptRotOptions, initial_rotation, learn
from optrot_edge.rotations.rotation import orthogonality_error
from tests.tiny_models import save_tiny

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(save_tiny(tmp_path_factory.mktemp("m") / "m", "qwen2_untied"))


def start(source, seed=0, which=("r1", "r2"), **blocks):
    return initial_rotation(source.config, set(which), torch.Generator().manual_seed(seed), **blocks)


def fused_loss(source, rotation):
    """The objective by its definition: fourth powers of what the fusing code makes of the weights."""
    model = RotatedModel(source, rotation)
    return sum(float(layer[f"{n}.weight"].pow(4).sum()) for i in range(source.config.num_hidden_layers)
               for layer in [model.layer(i, torch.float64)] for n in LINEARS)


@pytest.mark.parametrize("r4_block", [None, 32])
def test_gradients_equal_autograd(source, r4_block):
    config, rotation = source.config, start(source, r4_block=r4_block)
    layer = prepare_layer(source.layer(0, torch.float64), fold=True, r4_block=r4_block)
    r1, r2 = rotation.r1.clone().requires_grad_(), rotation.r2[0].clone().requires_grad_()
    loss = (residual_rows(layer, r2, config) @ r1).pow(4).sum()
    loss.backward()
    rows = residual_rows(layer, rotation.r2[0], config)
    value, gradient = optrot.fourth_power(rows, rotation.r1)
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, r1.grad, rtol=1e-10, atol=1e-12)
    _, gradient = fourth_power_batched(value_rows(layer, rotation.r1, config), rotation.r2[0])
    torch.testing.assert_close(gradient, r2.grad, rtol=1e-10, atol=1e-12)


def test_loss_is_that_of_the_fused_weights(source):
    rotation = start(source, r4_block=32)
    learner = optrot._Learner(source, rotation, OptRotOptions(), torch.Generator(), "cpu")
    assert sum(learner.losses()[0]) == pytest.approx(fused_loss(source, rotation), rel=1e-5)


@pytest.mark.parametrize("options", [
    OptRotOptions("cayley", 60, None), OptRotOptions("polar", 30, None), OptRotOptions("polar", 30, 500),
    OptRotOptions("cayley", 60, 500)], ids=lambda o: f"{o.solver}-{o.rows}")
@pytest.mark.parametrize("which", [("r1",), ("r2",), ("r1", "r2")], ids="+".join)
def test_learning_lowers_the_real_loss(source, options, which):
    first = start(source, which=which)
    learned = learn(source, first, options, torch.Generator().manual_seed(0))
    assert learned.recipe["loss"] == pytest.approx(fused_loss(source, learned), rel=1e-4)
    assert learned.recipe["loss"] < 0.995 * fused_loss(source, first)
    for matrix in (learned.r1, learned.r2):
        assert matrix is None or orthogonality_error(matrix) <= 1e-12


def test_same_seed_same_rotation(source):
    runs = [learn(source, start(source), OptRotOptions(steps=5, rows=200), torch.Generator().manual_seed(s))
            for s in (1, 1, 2)]
    assert torch.equal(runs[0].r1, runs[1].r1) and torch.equal(runs[0].r2, runs[1].r2)
    assert not torch.equal(runs[0].r1, runs[2].r1)


def test_sampling_is_unbiased(source):
    layer = prepare_layer(source.layer(0), fold=True, r4_block=None)
    rows = residual_rows(layer, None, source.config)
    generator = torch.Generator().manual_seed(0)
    learner = optrot._Learner(source, start(source), OptRotOptions(), generator, "cpu")
    x, w = learner.sample(rows, 200_000)
    estimate, _ = optrot.fourth_power(x, learner.r1, w)
    exact, _ = optrot.fourth_power(rows, learner.r1)
    assert float(estimate) == pytest.approx(float(exact), rel=5e-3)


@pytest.mark.parametrize("size", [2, 7, 32])
def test_steps_descend_and_stay_orthogonal(size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, size, generator=generator, dtype=torch.float64) ** 3
    r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    for update, lr in ((optrot.cayley_step, 1.0), (optrot.polar_step, 0.01)):
        loss, gradient = optrot.fourth_power(x, r)
        moved = update(r, gradient, lr)
        assert float(optrot.fourth_power(x, moved)[0]) < float(loss)
        assert orthogonality_error(moved) < (2e-2 if update is optrot.cayley_step else 1e-9)


def test_bad_options():
    with pytest.raises(InputError, match="solver"):
        OptRotOptions("adam")
    with pytest.raises(InputError, match="at least one"):
        OptRotOptions(steps=0)
