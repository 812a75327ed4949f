"""Asymmetric calibration: the corrections against their definition, their factors, and what they bring a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optrot_edge.checkpoint import CheckpointWriter
from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.quantize.asymmetric import Moments, _best_in_square, corrected, held_out_count
from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.rotation import Rotation
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.tensor_types import tensor_types
from tests.tiny_models import save_tiny

WIDTH, HIDDEN, DAMP = 24, 12, 0.05


class Tokens:
    """Activations of one set of windows: x̃, x, the gap of the residual stream, and their moments."""

    def __init__(self, generator, count, mix, noise=0.3, stream=True):
        self.x = torch.randn(count, WIDTH, generator=generator)
        self.x_float = self.x + self.x @ mix * 0.3 + noise * torch.randn(count, WIDTH, generator=generator)
        self.gap = self.x @ mix[:, :HIDDEN] * 0.5 + noise * torch.randn(count, HIDDEN, generator=generator)
        self.moments = Moments(WIDTH, "cpu", float_inputs=True, hidden=HIDDEN if stream else None)
        for rows in torch.arange(count).chunk(3):
            self.moments.add(self.x[rows], self.x_float[rows], self.gap[rows] if stream else None)

    def error(self, weight, target):
        """E‖W x + r − r̃ − W* x̃‖², without the residual stream where it has none."""
        wanted = self.x_float @ weight.T
        if self.moments.stream_gap is not None:
            wanted = wanted + self.gap
        return float((wanted - self.x @ target.T).square().sum(1).mean())


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(7)


def make(generator, *, noise=0.3, stream=True, fit=400, held_out=150):
    mix = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    sets = [Tokens(generator, count, mix, noise, stream) for count in (fit, held_out)]
    return torch.randn(HIDDEN, WIDTH, generator=generator), *sets


def by_definition(weight, sets, alpha, beta):
    """W* with V and U written out, from all tokens."""
    x, x_float, gap = (torch.cat([getattr(tokens, name) for tokens in sets]).double() for name in
                       ("x", "x_float", "gap"))
    h = x.T @ x / len(x)
    inverse = torch.linalg.inv(h + DAMP * h.diagonal().mean() * torch.eye(WIDTH, dtype=h.dtype))
    v = weight.double() @ ((x_float - x).T @ x / len(x)) @ inverse
    return weight.double() + alpha * v + beta * (gap.T @ x / len(x)) @ inverse


@pytest.mark.parametrize("stream", [True, False])
def test_target_is_the_definition(generator, stream):
    weight, fit, held_out = make(generator, stream=stream)
    found, factors = corrected({"w": weight}, fit.moments, held_out.moments, DAMP)
    assert set(factors["w"]) == ({"alpha", "beta"} if stream else {"alpha"})
    expected = by_definition(weight, (fit, held_out), factors["w"]["alpha"], factors["w"].get("beta", 0.0))
    torch.testing.assert_close(found["w"].double(), expected, rtol=0, atol=1e-5)


def test_factors_are_the_best_on_held_out_tokens(generator):
    """No other pair of a fine grid does better there, with V and U of the tokens to fit on."""
    weight, fit, held_out = make(generator, noise=0.4, fit=60)
    _, factors = corrected({"w": weight}, fit.moments, held_out.moments, DAMP)
    error = lambda a, b: held_out.error(weight, by_definition(weight, (fit,), a, b).float())  # noqa: E731
    best = error(**dict(zip(("a", "b"), factors["w"].values(), strict=True)))
    others = [error(a / 20, b / 20) for a in range(21) for b in range(21)]
    assert best <= min(others) * (1 + 1e-5) and best < 0.9 * others[0]
    assert 0 < factors["w"]["alpha"] < 1


def test_what_can_be_made_up_for_is(generator):
    """Without noise, W* on x̃ does what W does on x, and repays the stream's error."""
    weight, fit, held_out = make(generator, noise=0.0)
    found, factors = corrected({"w": weight}, fit.moments, held_out.moments, 1e-6)
    assert factors["w"]["alpha"] == pytest.approx(1, abs=1e-3) == factors["w"]["beta"]
    assert held_out.error(weight, found["w"]) < 1e-6 * held_out.error(weight, weight)


def test_errors_that_nothing_predicts_are_left_alone(generator):
    weight, *_ = make(generator)
    sets = [Tokens(generator, count, torch.zeros(WIDTH, WIDTH), noise=2.0) for count in (60, 4000)]
    found, factors = corrected({"w": weight}, *(tokens.moments for tokens in sets), DAMP)
    assert max(factors["w"].values()) < 0.1
    assert sets[1].error(weight, found["w"]) < 1.01 * sets[1].error(weight, weight)


def test_equal_streams_change_nothing(generator):
    weight, x = torch.randn(HIDDEN, WIDTH, generator=generator), torch.randn(50, WIDTH, generator=generator)
    moments = [Moments(WIDTH, "cpu", float_inputs=True, hidden=HIDDEN) for _ in range(2)]
    for one in moments:
        one.add(x, x, torch.zeros(50, HIDDEN))
    found, factors = corrected({"w": weight}, *moments, DAMP)
    assert torch.equal(found["w"], weight) and factors == {"w": {"alpha": 0.0, "beta": 0.0}}


def test_dead_inputs(generator):
    """Channels that are always 0 in both streams, or all of them: finite targets, dead columns as they were."""
    weight = torch.randn(HIDDEN, WIDTH, generator=generator)
    for dead in (slice(3, 7), slice(None)):
        moments = [Moments(WIDTH, "cpu", float_inputs=True, hidden=HIDDEN) for _ in range(2)]
        for one in moments:
            x = torch.randn(80, WIDTH, generator=generator)
            x_float = x + 0.1 * torch.randn(80, WIDTH, generator=generator)
            x[:, dead] = x_float[:, dead] = 0
            one.add(x, x_float, torch.randn(80, HIDDEN, generator=generator))
        found, _ = corrected({"w": weight}, *moments, DAMP)
        torch.testing.assert_close(found["w"][:, dead], weight[:, dead], rtol=0, atol=1e-6)
        assert found["w"].isfinite().all()


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.lists(st.floats(-5, 5), min_size=2, max_size=2))
def test_minimum_in_the_square(entries, right):
    root, right = torch.tensor(entries, dtype=torch.float64).view(2, 2), torch.tensor(right, dtype=torch.float64)
    gram = root @ root.T + 1e-6 * torch.eye(2, dtype=torch.float64)
    value = lambda f: float(f @ gram @ f / 2 - right @ f)  # noqa: E731
    found = torch.tensor(_best_in_square(gram, right), dtype=torch.float64)
    assert bool(((found >= 0) & (found <= 1)).all())
    for a in torch.linspace(0, 1, 11, dtype=torch.float64):
        for b in torch.linspace(0, 1, 11, dtype=torch.float64):
            assert value(found) <= value(torch.stack([a, b])) + 1e-6


@pytest.mark.parametrize(("windows", "held_out"), [(2, 1), (8, 1), (15, 1), (16, 2), (96, 12)])
def test_windows_held_out(windows, held_out):
    assert held_out_count(windows) == held_out


def test_one_window_is_too_few():
    with pytest.raises(InputError, match="at least two windows"):
        held_out_count(1)
    assert Recipe(nsamples=1).asymmetric == "none"
    with pytest.raises(InputError, match="--asymmetric residual is for GPTQ .* at least two windows"):
        Recipe(nsamples=1, asymmetric="residual")


@pytest.mark.parametrize(("fields", "level"), [({}, "residual"), ({"quantizer": "rtn"}, "none"),
                                               ({"type": "f16", "rotation": "none"}, "none"),
                                               ({"asymmetric": "inputs"}, "inputs")])
def test_what_a_recipe_stands_for(fields, level):
    assert Recipe(**fields).asymmetric == level


@pytest.mark.parametrize("fields", [{"asymmetric": "some"}, {"asymmetric": "residual", "method": "rtn"}])
def test_options_that_do_not_fit(fields):
    with pytest.raises(InputError, match="asymmetric"):
        QuantizerOptions({}, **fields)


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """By level: mean squared error of the final hidden states on other tokens, and the reports."""
    folder = tmp_path_factory.mktemp("asymmetric")
    source = open_model(save_tiny(folder / "m", "qwen2_untied"))
    generator = torch.Generator().manual_seed(2)
    tokens, others = (torch.randint(0, source.config.vocab_size, (count, 64), generator=generator)
                      for count in (32, 16))
    expected, found = forward.final_hidden(source, others), {}
    types = tensor_types(source.family, source.config, Recipe(type="int2-g32-min", embedding_type="int4-g32-min"))
    for level in ("none", "inputs", "residual"):
        quantizer = SequentialQuantizer(RotatedModel(source, Rotation("none")), QuantizerOptions(
            types, asymmetric=level, batch_size=4), tokens)
        with CheckpointWriter(folder / level) as writer:
            quantizer.run(writer)
            writer.finish({"model": source.config.to_dict()})
        hidden = forward.final_hidden(DecodedCheckpoint(folder / level), others)
        found[level] = float((hidden - expected).square().mean()), quantizer.reports
    return found


def test_a_model_gains(quantised):
    """On tokens that were not calibrated on; making up for the residual stream gains most."""
    errors = {level: error for level, (error, _) in quantised.items()}
    assert errors["residual"] < 0.97 * errors["none"] and errors["inputs"] < errors["none"]


def test_factors_are_reported(quantised):
    reports = quantised["residual"][1]
    assert 0 < reports["layers.1.gate_proj"]["alpha"] <= 1 and "beta" not in reports["layers.1.gate_proj"]
    assert reports["layers.1.down_proj"]["beta"] > 0
    assert "beta" not in quantised["inputs"][1]["layers.1.down_proj"]
    assert "alpha" not in quantised["none"][1]["layers.1.down_proj"]
