"""SpinQuant and OSTQuant: the loss falls, the function stays, runs repeat, and what does not help is not kept."""

from dataclasses import replace

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations import end_to_end
from optrot_edge.rotations.baselines import END_TO_END
from optrot_edge.rotations.end_to_end import QuantizedNetwork, learn_end_to_end
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.rotation import ORTHOGONALITY, Rotation, orthogonality_error, scale_widths
from optrot_edge.rotations.rounding import Rounding
from tests.rotations.test_optrot_plus import make_uneven
from tests.rotations.test_rounding import Rounded
from tests.tiny_models import random_tokens, save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(make_uneven(save_tiny(tmp_path_factory.mktemp("e2e") / "m", "smollm2")))


@pytest.fixture(scope="module")
def tokens(source):
    """Windows that the model itself has written, so that it has something to lose."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, 512, (64, 1), generator=generator)
    for _ in range(31):
        p = forward.logits(source, drawn)[:, -1].mul(3).softmax(-1)
        drawn = torch.cat([drawn, torch.multinomial(p, 1, generator=generator)], 1)
    return drawn


def start_of(source, which=("r1", "r2"), **blocks):
    return initial_rotation(source.config, set(which), torch.Generator().manual_seed(0), **blocks)


def learn(source, text, name, start=None, seed=0, **changes):
    options = replace(END_TO_END[name], **{"steps": 12, "tokens": 256} | changes)
    return learn_end_to_end(source, name, start or start_of(source), "q4_0", text, options,
                            torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("windows", "asked", "seen"), [(64, 100, 96), (64, 10, 32), (8, 4096, 224)])
def test_the_recipe_holds_the_tokens_a_step_had(source, tokens, windows, asked, seen):
    """Whole windows of 32, no more than there are to learn on."""
    assert learn(source, tokens[:windows], "spinquant", steps=1, tokens=asked).recipe["tokens"] == seen


@pytest.mark.parametrize(("name", "changes"), [
    ("spinquant", {"steps": 30, "tokens": 1792}),
    ("spinquant-a4", {"lr": 5.0, "steps": 30, "tokens": 1792}),
    ("spinquant-w4", {"lr": 2.0, "steps": 20, "tokens": 512}),
    ("ostquant", {"steps": 20, "tokens": 512})])
def test_the_loss_falls_and_the_function_stays(source, tokens, name, changes):
    rotation = learn(source, tokens, name, **changes)
    recipe = rotation.recipe
    assert recipe["kept"] and recipe["loss"] < recipe["loss_start"] and len(recipe["loss_curve"]) == changes["steps"]
    assert rotation.method == name and rotation.applied == ["r1", "r2"]
    assert set(rotation.scales) == (set(scale_widths(source.config)) if name == "ostquant" else set())
    for matrix in (rotation.r1, rotation.r2):
        assert orthogonality_error(matrix) <= ORTHOGONALITY
    assert float((rotation.r1 - start_of(source).r1).abs().max()) > 1e-3
    want = forward.logits(source, random_tokens(), dtype=torch.float64)
    got = forward.logits(RotatedModel(source, rotation), random_tokens(), dtype=torch.float64)
    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())


def test_spinquants_published_loss(source, tokens):
    """Which need not fall on a model as small as this."""
    rotation = learn(source, tokens, "spinquant", loss="cross-entropy", through_range=False, lr=1.5, steps=2)
    recipe = rotation.recipe
    assert recipe["kept"] == (recipe["loss"] < recipe["loss_start"]) and 3 < recipe["loss_start"] < 6
    assert (recipe["activations"], recipe["weights"], recipe["grid"]) == (8, False, None)


def test_ostquant_takes_the_quantised_model_nearer_to_the_original(source, tokens):
    """By KL over all tokens of other text, the fused model's weights rounded, its activations too."""
    others = torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(9))
    want = forward.logits(source, others).log_softmax(-1)

    def kl(rotation):
        model = Rounded(RotatedModel(source, rotation), Grid("q4_0"))
        got = forward.logits(model, others, activations=8).log_softmax(-1)
        return float(torch.nn.functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())

    learned = learn(source, tokens, "ostquant", steps=80, tokens=1024, scale_lr=0.04)
    assert kl(learned) < 0.92 * kl(start_of(source))


@pytest.mark.parametrize("name", ["spinquant-a4", "ostquant"])
def test_the_same_seed_gives_the_same_bits(source, tokens, name):
    first, again, other = (learn(source, tokens, name, seed=seed, steps=3) for seed in (0, 0, 1))
    assert torch.equal(first.r1, again.r1) and torch.equal(first.r2, again.r2) and first.recipe == again.recipe
    assert first.recipe["loss_curve"] != other.recipe["loss_curve"]
    if first.recipe["kept"] or other.recipe["kept"]:  # else both are the start
        assert not torch.equal(first.r1, other.r1)


def test_checkpointing_changes_nothing(source, tokens, monkeypatch):
    first = learn(source, tokens, "spinquant-a4", steps=3)
    monkeypatch.setattr(end_to_end, "spare_memory", lambda device: 0)  # neither layers nor activations are kept
    again = learn(source, tokens, "spinquant-a4", steps=3)
    assert torch.equal(first.r1, again.r1) and first.recipe == again.recipe


def test_the_start_is_kept_when_nothing_is_won(source, tokens):
    start = start_of(source)
    rotation = learn(source, tokens, "spinquant-a4", start, lr=-20.0)  # uphill
    assert not rotation.recipe["kept"] and rotation.recipe["loss"] >= rotation.recipe["loss_start"]
    assert torch.equal(rotation.r1, start.r1) and torch.equal(rotation.r2, start.r2)


@pytest.mark.parametrize("which", [("r1",), ("r2",), ()])
def test_parts_alone(source, tokens, which):
    rotation = learn(source, tokens, "ostquant", start_of(source, which), steps=10)
    assert tuple(rotation.applied) == which and rotation.recipe["loss"] < rotation.recipe["loss_start"]
    if "r1" not in which:  # from the native gains on
        gain = source.layer(0)["attn_norm.weight"].abs()
        assert float((rotation.scales["attn_norm"][0] / gain).log().abs().max()) < 0.2


def test_r4_stays_online_and_rules_out_the_scale_behind_it(source, tokens):
    rotation = learn(source, tokens, "ostquant", start_of(source, r4_block=32), steps=2)
    assert rotation.r4_block == 32 and set(rotation.scales) == {"attn_norm", "mlp_norm", "value"}
    rotation.validate(source.config)


def test_losses_are_those_of_the_definition(source, tokens):
    """Against torch's own cross-entropy and KL, without rounding."""
    windows = torch.tensor([3, 5])
    logits = forward.logits(source, tokens[windows], dtype=torch.float64)
    network = QuantizedNetwork(source, Rounding(), "cross-entropy", tokens, 64, dtype=torch.float64)
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[windows, 1:].flatten())
    assert network.loss(windows, Rotation("none")) == pytest.approx(float(want), rel=1e-10)
    rounded = QuantizedNetwork(source, Rounding(4), "kl-top", tokens, 64, dtype=torch.float64)
    with torch.no_grad():
        got = rounded.loss(windows, Rotation("none"))
    mine = forward.logits(source, tokens[windows], dtype=torch.float64, activations=4).log_softmax(-1)
    full = torch.nn.functional.kl_div(mine, logits.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    assert got == pytest.approx(float(full), rel=1e-6)  # the model has fewer than 1,000 tokens


def test_too_little_text(source, tokens):
    with pytest.raises(InputError, match="at least two"):
        learn(source, tokens[:1], "spinquant")


def test_a_grid_that_does_not_fit(source, tokens):
    with pytest.raises(InputError, match="do not divide into groups of 128"):
        learn_end_to_end(source, "spinquant-w4", start_of(source), "int4-g128-sym", tokens, END_TO_END["spinquant-w4"],
                         torch.Generator())
