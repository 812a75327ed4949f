"""KurTail: kurtosis by hand, what is sampled, and that it falls."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.rotations import kurtail
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.kurtail import kurtosis_loss, learn_kurtail, sample_inputs
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.rotation import ORTHOGONALITY, orthogonality_error
from tests.rotations.test_optrot_plus import make_uneven
from tests.tiny_models import random_tokens, save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(make_uneven(save_tiny(tmp_path_factory.mktemp("kurtail") / "m", "qwen2_untied")))


def learn(source, which=("r1", "r2"), seed=0, tokens=None, steps=20):
    start = initial_rotation(source.config, set(which), torch.Generator().manual_seed(0))
    return start, learn_kurtail(source, start, random_tokens(16, 32) if tokens is None else tokens, steps,
                                torch.Generator().manual_seed(seed))


def test_kurtosis_by_hand():
    # 0, 2: mean 1, κ = 1. −3, 0, 0, 3: second 4.5, fourth 40.5, κ = 2. A repeated value has none.
    assert float(kurtosis_loss(torch.tensor([[0.0, 2.0]]))) == pytest.approx(0.8)
    assert float(kurtosis_loss(torch.tensor([[-3.0, 0.0, 0.0, 3.0]]))) == pytest.approx(0.2)
    assert float(kurtosis_loss(torch.tensor([[5.0, 5.0], [0.0, 2.0]]))) == pytest.approx(0.4)
    uniform = torch.linspace(-1, 1, 100001, dtype=torch.float64)[None]
    assert float(kurtosis_loss(uniform)) < 1e-4


def test_what_is_sampled(source):
    tokens = random_tokens(4, 12)
    reads, values = sample_inputs(source, tokens, tokens.numel(), torch.Generator().manual_seed(0))
    config, layer = source.config, source.layer(0, torch.float32)
    x = torch.nn.functional.embedding(tokens, source.embedding())
    normed = forward.rms_norm(x, torch.ones(config.hidden_size), config.rms_norm_eps)
    torch.testing.assert_close(reads[:, 0], normed.flatten(0, 1))
    v = forward.linear(normed * layer["attn_norm.weight"], layer, "v_proj")
    want = v.flatten(0, 1).view(-1, config.num_key_value_heads, config.head_dim).transpose(0, 1)
    torch.testing.assert_close(values[0], want)
    assert reads.shape == (48, 4, config.hidden_size)
    torch.testing.assert_close(reads.square().mean(-1), torch.ones(48, 4), rtol=0, atol=1e-3)
    few, _ = sample_inputs(source, tokens, 10, torch.Generator().manual_seed(0))
    assert len(few) == 10 and all((reads == row).all(-1).all(-1).any() for row in few)


@pytest.mark.parametrize("which", [("r1", "r2"), ("r1",), ("r2",)])
def test_kurtosis_falls_and_the_function_stays(source, which):
    start, rotation = learn(source, which)
    recipe = rotation.recipe
    assert recipe["kept"] and recipe["loss"] < recipe["loss_start"] and len(recipe["loss_curve"]) == 20
    assert tuple(rotation.applied) == which and rotation.method == "kurtail"
    for matrix in (rotation.r1, rotation.r2):
        assert matrix is None or orthogonality_error(matrix) <= ORTHOGONALITY
    reads, values = sample_inputs(source, random_tokens(16, 32, seed=7), 512, torch.Generator())
    for name, rows in (("r1", reads.flatten(0, 1)), ("r2", values)):
        if name in which:
            before, after = (float(kurtosis_loss(rows @ getattr(r, name).float()).mean()) for r in (start, rotation))
            assert after < before, name
    want = forward.logits(source, random_tokens(), dtype=torch.float64)
    got = forward.logits(RotatedModel(source, rotation), random_tokens(), dtype=torch.float64)
    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())


def test_a_step_sees_some_of_the_tokens(source, monkeypatch):
    """And so learns less by heart than from as many that stay the same."""
    monkeypatch.setattr(kurtail, "STEP_TOKENS", 48)
    recipe = learn(source, steps=40)[1].recipe
    assert recipe["tokens"] == 48 and recipe["sampled_tokens"] == 448
    monkeypatch.setattr(kurtail, "TOKENS", 56)
    same = learn(source, steps=40)[1].recipe
    assert same["tokens"] == 48 and same["sampled_tokens"] == 49
    assert recipe["loss"] / recipe["loss_start"] < same["loss"] / same["loss_start"]
    assert recipe["loss_curve"][-1] > same["loss_curve"][-1]


def test_the_same_seed_gives_the_same_bits(source):
    first, again = (learn(source, steps=3)[1] for _ in range(2))
    assert torch.equal(first.r1, again.r1) and torch.equal(first.r2, again.r2) and first.recipe == again.recipe


def test_the_start_is_kept_when_nothing_is_won(source, monkeypatch):
    loss = kurtosis_loss
    monkeypatch.setattr(kurtail, "kurtosis_loss", lambda z: -loss(z) if z.requires_grad else loss(z))  # uphill
    start, rotation = learn(source)
    assert not rotation.recipe["kept"] and torch.equal(rotation.r1, start.r1) and torch.equal(rotation.r2, start.r2)


def test_too_little_text(source):
    with pytest.raises(InputError, match="at least 16 calibration tokens"):
        learn(source, tokens=random_tokens(1, 8))
