"""The analysis arms: exact without rounding, better for learning, the same for a seed, run by the torch backend."""

import numpy as np
import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.models.activations import fake_quantize_tokens
from optrot_edge.quantize.grids import Grid
from optrot_edge.rotations import analysis
from optrot_edge.rotations.analysis import (
    RATES,
    AnalysisOptions,
    LearnedTransforms,
    analyse,
    learn_transform,
    learn_transforms,
    output_error,
    quantised,
)
from optrot_edge.rotations.baselines import ONLINE
from optrot_edge.rotations.transforms import Butterfly, Hadamard, Kronecker
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.rotations.test_optrot_plus import make_uneven
from tests.tiny_models import random_tokens, save_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(make_uneven(save_tiny(tmp_path_factory.mktemp("analysis") / "m", "llama_bias")))


def view_of(source, method, seed=0, **options):
    learned = learned_of(source, method, seed, **options) if method in RATES else None
    return analyse(source, random_tokens(12, 32), AnalysisOptions(method, **{"steps": 4} | options),
                   torch.Generator().manual_seed(seed), learned=learned)


def learned_of(source, method, seed=0, **options):
    return learn_transforms(source, random_tokens(12, 32), AnalysisOptions(method, **{"steps": 4} | options),
                            torch.Generator().manual_seed(seed))


def kl(source, view, activations=16):
    others = random_tokens(6, 32, seed=5)
    want = forward.logits(source, others).log_softmax(-1)
    got = forward.logits(view, others, activations=activations).log_softmax(-1)
    return float(torch.nn.functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())


@pytest.mark.parametrize("method", ONLINE)
def test_nothing_changes_on_a_fine_grid(source, method):
    view = view_of(source, method, grid="q8_0", steps=1)
    assert kl(source, view) < 2e-4
    assert 0.3 < kl(source, view_of(source, method, grid="int2-g32-sym", quantizer="rtn", steps=1)) < 100


@pytest.mark.parametrize("method", ONLINE)
def test_gptq_beats_rounding_and_activations_cost(source, method):
    plain = view_of(source, method)
    assert kl(source, plain) < 0.9 * kl(source, view_of(source, method, quantizer="rtn"))
    eight, four = (kl(source, plain, bits) for bits in (8, 4))
    assert kl(source, plain) < 1.2 * eight and eight < four


@pytest.mark.parametrize("method", ["flatquant", "butterflyquant"])
def test_learning_lowers_the_output_error(source, method):
    """On tokens that only judge, weights and activations rounded, summed over all inputs."""
    learned = learned_of(source, method, steps=80, activations=4)
    errors = [pair for layer in learned.losses for pair in layer.values()]
    assert len(errors) == 8 and all(after <= before for before, after in errors)
    before, after = map(sum, zip(*errors, strict=True))
    assert after < 0.95 * before
    assert learned.learning == {"steps": 80, "tokens_per_step": 336, "loss_start": before, "loss": after}


def test_the_start_is_kept_when_nothing_is_won(monkeypatch):
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: [p.add_(0.5 * torch.arange(p.numel()).view(p.shape))
                                                                for p in self.param_groups[0]["params"]])
    generator = torch.Generator().manual_seed(0)
    transform = Butterfly.start(32, generator)
    start = transform.angles.detach().clone()
    weight, x, judging = (torch.randn(rows, 32, generator=generator) for rows in (8, 64, 8))
    before, after = learn_transform(transform, weight, x, judging, AnalysisOptions("butterflyquant", steps=5))
    assert before == after and torch.equal(transform.angles, start)


def test_the_error_is_that_of_the_rounded_linear():
    """Against rounding written out, in float64."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 64, generator=generator, dtype=torch.float64) for rows in (10, 20))
    transform, grid = Kronecker.start(64, generator), Grid("q4_0")
    turned = transform.weight(weight)
    rounded = turned + analysis.weight_error(turned, grid)
    z, y = fake_quantize_tokens(transform.apply(x), 4), x @ weight.T
    want = (z @ rounded.T - y).square().sum() / y.square().sum()
    assert float(output_error(transform, weight, x, y, grid, 4)) == pytest.approx(float(want), rel=1e-5)


@pytest.mark.parametrize("method", RATES)
def test_what_was_learned_is_kept_in_a_file(source, method, tmp_path):
    learned = learned_of(source, method)
    learned.save(tmp_path / "t.safetensors")
    again = LearnedTransforms.load(tmp_path / "t.safetensors")
    assert again.learning == learned.learning and again.method == method
    options, tokens = AnalysisOptions(method), random_tokens(12, 32)
    made = [analyse(source, tokens, options, torch.Generator(), learned=which) for which in (learned, again)]
    assert kl(source, made[0], 4) == kl(source, made[1], 4)
    (tmp_path / "t.safetensors").write_bytes(b"none")
    with pytest.raises(InputError, match="holds no learned transforms"):
        LearnedTransforms.load(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="cannot write"):
        learned.save(tmp_path / "missing" / "t.safetensors")


def test_transforms_of_another_method(source):
    tokens, generator = random_tokens(4, 16), torch.Generator()
    with pytest.raises(InputError, match="flatquant takes what"):
        analyse(source, tokens, AnalysisOptions("flatquant"), generator)
    with pytest.raises(InputError, match="quip# takes none"):
        analyse(source, tokens, AnalysisOptions("quip#"), generator, learned=learned_of(source, "flatquant"))
    with pytest.raises(InputError, match="quip# learns nothing"):
        learned_of(source, "quip#")


@pytest.mark.parametrize("method", ["quip#", "butterflyquant"])
def test_the_same_seed_gives_the_same_bits(source, method):
    first, again, other = (view_of(source, method, seed=seed, steps=2) for seed in (0, 0, 1))
    assert all(torch.equal(first.layer(1)[name], again.layer(1)[name]) for name in first.layer(1))
    assert not torch.equal(first.layer(1)["q_proj.weight"], other.layer(1)["q_proj.weight"])


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_small_matrices_do_not_get_the_errors_of_large_ones(quantizer):
    """Of those that read the same input, as v beside q and k: outputs are mixed within each."""
    generator = torch.Generator().manual_seed(0)
    weights = [scale * torch.randn(rows, 64, generator=generator) for scale, rows in ((1.0, 48), (0.01, 24))]
    found = quantised(weights, torch.eye(64), Hadamard.start(64, generator),
                      AnalysisOptions("quip#", "q4_0", quantizer), generator)
    for weight, decoded in zip(weights, found, strict=True):
        assert 0.03 < float((weight - decoded).norm() / weight.norm()) < 0.12


def test_the_torch_backend_runs_it(source):
    view, tokens = view_of(source, "quip#"), random_tokens(2, 16).numpy().astype(np.int64)
    with TorchBackend(view, activations=8) as rounded, TorchBackend(view) as plain:
        got = rounded.logits_batch(tokens)
        want = forward.logits(view, torch.from_numpy(tokens), activations=8).numpy()
        np.testing.assert_array_equal(got, want)
        assert np.abs(plain.logits_batch(tokens) - got).max() > 1e-4


@pytest.mark.parametrize(("options", "says"), [
    ({"method": "awq"}, "unknown method 'awq'"), ({"method": "quip#", "quantizer": "ldlq"}, "unknown quantizer"),
    ({"method": "flatquant", "steps": 0}, "at least one step"), ({"method": "flatquant", "activations": 1}, "1 bits"),
])
def test_refusals(options, says):
    with pytest.raises(InputError, match=says):
        AnalysisOptions(**options)


def test_a_grid_that_does_not_fit(source):
    with pytest.raises(InputError, match="do not divide into groups of 64"):
        view_of(source, "quip#", grid="int4-g64-sym")
