"""OptRot: objective and gradients against autograd and the fused weights, descent, draws, memory, top-50."""


import pytest
import torch

from optrot_edge.kernels.fourth_power import fourth_power
from optrot_edge.models import open_model
from optrot_edge.rotations import learner as learning
from optrot_edge.rotations import optrot
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.learner import Learner
from optrot_edge.rotations.objective import MATRICES, LayerRows, value_gradient, value_problems
from optrot_edge.rotations.optrot import OptRotOptions, initial_rotation, learn
from optrot_edge.rotations.rotation import orthogonality_error
from tests.tiny_models import save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(save_tiny(tmp_path_factory.mktemp("m") / "m", "qwen2_untied"))


def start(source, seed=0, which=("r1", "r2"), **blocks):
    return initial_rotation(source.config, set(which), torch.Generator().manual_seed(seed), **blocks)


def new_learner(source, options=None, **blocks):
    return Learner(source, start(source, **blocks), options or OptRotOptions(), torch.Generator(), "cpu")


def fused_losses(source, rotation):
    """The objective by its definition: fourth powers of what the fusing code makes of the weights."""
    model = RotatedModel(source, rotation)
    return torch.tensor([[float(layer[f"{n}.weight"].pow(4).sum()) for n in MATRICES]
                         for i in range(source.config.num_hidden_layers)
                         for layer in [model.layer(i, torch.float64)]])


def fused_loss(source, rotation):
    return float(fused_losses(source, rotation).sum())


@pytest.mark.parametrize("r4_block", [None, 32])
def test_gradients_equal_autograd(source, r4_block):
    rotation = start(source, r4_block=r4_block)
    rows = LayerRows.of(source.layer(0, torch.float64), source.config, fold=True, r4_block=r4_block)
    r1, r2 = rotation.r1.clone().requires_grad_(), rotation.r2[0].clone().requires_grad_()
    loss = (rows.fixed @ r1).pow(4).sum() + (rows.value_rows(r2) @ r1).pow(4).sum()
    loss.backward()
    value, gradient = rows.gradient(rotation.r1, rotation.r2[0])
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, r1.grad, rtol=1e-10, atol=1e-12)
    value, gradient = value_gradient(value_problems([rows], rotation.r1), rotation.r2[0])
    torch.testing.assert_close(value.sum(), (rows.value_rows(r2) @ rotation.r1).pow(4).sum().detach())
    torch.testing.assert_close(gradient, r2.grad, rtol=1e-10, atol=1e-12)


def test_losses_are_those_of_the_fused_weights(source):
    rotation = start(source, r4_block=32)
    found = Learner(source, rotation, OptRotOptions(), torch.Generator(), "cpu").losses()
    torch.testing.assert_close(found, fused_losses(source, rotation).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [
    OptRotOptions("cayley", 60), OptRotOptions("polar", 30, 0), OptRotOptions("polar", 30, 500),
    OptRotOptions("cayley", 60, 500)], ids=lambda o: f"{o.solver}-{o.rows}")
@pytest.mark.parametrize("which", [("r1",), ("r2",), ("r1", "r2")], ids="+".join)
def test_learning_lowers_the_real_loss(source, options, which):
    first = start(source, which=which)
    learned = learn(source, first, options, torch.Generator().manual_seed(0))
    recipe = learned.recipe
    assert recipe["loss"] == pytest.approx(fused_loss(source, learned), rel=1e-4)
    assert recipe["loss_start"] == pytest.approx(fused_loss(source, first), rel=1e-4)
    assert recipe["loss"] < 0.995 * recipe["loss_start"]
    assert sum(recipe["layer_loss"]) == pytest.approx(recipe["loss"])
    assert len(recipe["loss_curve"]) == recipe["steps_taken"]
    for matrix in (learned.r1, learned.r2):
        assert matrix is None or orthogonality_error(matrix) <= 1e-12


def test_full_steps_log_the_exact_loss(source):
    learned = learn(source, start(source), OptRotOptions("cayley", 3), torch.Generator())
    assert learned.recipe["loss_curve"][0] == pytest.approx(learned.recipe["loss_start"], rel=1e-5)


def test_sampled_steps_estimate_the_loss(source):
    learned = learn(source, start(source), OptRotOptions(steps=30, rows=800), torch.Generator())
    last = learned.recipe["loss_curve"][-5:]
    assert sum(last) / 5 == pytest.approx(learned.recipe["loss"], rel=0.02)


def test_same_seed_same_rotation(source):
    runs = [learn(source, start(source), OptRotOptions(steps=5, rows=200), torch.Generator().manual_seed(s))
            for s in (1, 1, 2)]
    assert torch.equal(runs[0].r1, runs[1].r1) and torch.equal(runs[0].r2, runs[1].r2)
    assert not torch.equal(runs[0].r1, runs[2].r1)


class Counting:
    """A reader that counts the layers read."""

    def __init__(self, source):
        self.source, self.config, self.reads = source, source.config, 0

    def layer(self, index, dtype):
        self.reads += 1
        return self.source.layer(index, dtype)


@pytest.mark.parametrize("rows", [0, 300])
def test_memory_changes_reading_but_not_the_result(source, rows, monkeypatch):
    found = []
    for memory, chunk in ((0, 0), (2**30, 2**30)):
        monkeypatch.setattr(learning, "CHUNK", chunk)
        reader = Counting(source)
        options = OptRotOptions(steps=10, rows=rows, memory=memory)
        found.append((learn(reader, start(source), options, torch.Generator()), reader.reads))
    (streamed, many), (kept, few) = found
    layers = source.config.num_hidden_layers
    passes = 10 if rows == 0 else 2
    # Before and after, and (when rows are drawn) their masses, take a pass each besides those of the steps.
    assert many == (2 + passes + (rows > 0)) * layers and few < many
    torch.testing.assert_close(streamed.r1, kept.r1, rtol=0, atol=1e-5)
    torch.testing.assert_close(streamed.r2, kept.r2, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool_rows", [150, 10**6], ids=["shared", "fresh"])
def test_draws_are_unbiased(source, pool_rows):
    """Over many draws of a pool and of a batch from it, the gradient is that of all rows."""
    learner = new_learner(source)
    sampler, r1 = learner.sampler(), learner.r1.matrix
    scale, pool_scale = sampler.scale(100), sampler.scale(pool_rows)
    exact = sum(rows.gradient(r1, learner.r2_of(i))[1] for i, rows in learner.layers())
    taken, mean, draws = [], torch.zeros_like(r1), 400
    learner.descend_residual = lambda gradient, step: taken.append(gradient.float())
    for step in range(draws):
        pool = [(i, *learner.draw(rows, i, step, pool_scale)) for i, rows in learner.layers()]
        learner.pool_step(step, pool, scale, pool_scale)
        mean += taken[-1] / draws
    one = float((taken[0] - exact).norm() / exact.norm())
    assert float((mean - exact).norm() / exact.norm()) < 3 * one / draws**0.5
    assert one > 0.05  # or there was nothing to average


def test_no_row_twice_and_heavy_rows_always(source):
    learner = new_learner(source)
    rows = next(iter(learner.layers()))[1]
    drawn, mass = learner.draw(rows, 0, 3, learner.sampler().scale(400))
    assert len(drawn) == len(mass) == len(torch.unique(drawn, dim=0))
    everything, _ = learner.draw(rows, 0, 3, 1e30)
    torch.testing.assert_close(everything, torch.cat([rows.fixed, rows.value_rows(learner.r2_of(0))]))


def test_top_objective_learns_from_its_matrices_only(source, monkeypatch):
    monkeypatch.setattr(optrot, "TOP", 3)
    first = start(source)
    before = fused_losses(source, first)
    bound = before.flatten().sort(descending=True).values[2]
    learned = learn(source, first, OptRotOptions(steps=30, rows=0, objective="top-50"), torch.Generator())
    counted = before >= bound
    assert learned.recipe["objective_loss_start"] == pytest.approx(float(before[counted].sum()), rel=1e-5)
    after = fused_losses(source, learned)
    assert learned.recipe["objective_loss"] == pytest.approx(float(after[counted].sum()), rel=1e-4)
    assert learned.recipe["loss"] == pytest.approx(float(after.sum()), rel=1e-4)
    everything = learn(source, first, OptRotOptions(steps=30, rows=0), torch.Generator())
    assert learned.recipe["objective_loss"] < float(fused_losses(source, everything)[counted].sum())


def test_top_gradient_is_that_of_its_matrices(source):
    learner = new_learner(source)
    learner.choose(learner.losses(), 4)
    assert sum(map(len, learner.chosen.values())) == 4
    for index, rows in learner.layers():
        plain = learner.read(index).matrices(learner.r2_of(index))
        expected = torch.zeros_like(learner.r1.matrix)
        for name in learner.chosen[index]:
            expected += fourth_power(plain[name], learner.r1.matrix)[1]
        torch.testing.assert_close(rows.gradient(learner.r1.matrix, learner.r2_of(index))[1], expected,
                                   rtol=1e-4, atol=1e-5)


def test_target_ends_the_run(source):
    whole = learn(source, start(source), OptRotOptions(steps=60, rows=0), torch.Generator()).recipe
    target = 0.04 * whole["loss_start"] + 0.96 * whole["loss"]
    ended = learn(source, start(source), OptRotOptions(steps=60, rows=0, target=target), torch.Generator()).recipe
    assert ended["steps_taken"] < 60 and ended["loss"] <= target
    losses = ended["loss_curve"]
    assert sum(losses[-10:]) / 10 <= target < sum(losses[-11:-1]) / 10
    assert losses == whole["loss_curve"][:len(losses)]


def test_tolerance_ends_the_run(source):
    ended = learn(source, start(source), OptRotOptions("cayley", 400, tolerance=0.01), torch.Generator()).recipe
    losses = ended["loss_curve"]
    assert 20 <= len(losses) < 400
    assert sum(losses[-10:]) > 0.99 * sum(losses[-20:-10])
    assert sum(losses[-11:-1]) <= 0.99 * sum(losses[-21:-11]) or len(losses) == 20
