"""Weights of tokens against autograd through the whole model, and what they do to the Hessian."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.quantize import guidance
from optrot_edge.quantize.asymmetric import Moments
from optrot_edge.quantize.guidance import READERS, token_weights
from optrot_edge.quantize.sequential import QuantizerOptions, SequentialQuantizer
from optrot_edge.quantize.statistics import MeanProduct
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.rotation import Rotation
from tests.road import FAST, save_model
from tests.tiny_models import random_tokens, save_tiny


@pytest.mark.parametrize("case", ["smollm2", "qwen2_untied", "mistral_window"])
def test_weights_are_mean_squared_gradients(case, tmp_path, monkeypatch):
    source, tokens = open_model(save_tiny(tmp_path / "m", case)), random_tokens(5, 12)
    config, names = source.config, [name for stage in READERS.values() for name in stage]
    towards = torch.randn(5, 12, config.hidden_size, generator=torch.Generator().manual_seed(1))
    left = iter(towards.split(2))
    monkeypatch.setattr(guidance, "head_gradient", lambda *_: next(left).clone())
    monkeypatch.setattr(guidance, "CHUNK_TOKENS", 24)
    found = token_weights(source, tokens)

    outputs, rope = {}, forward.rope_tables(config, 12)
    x = F.embedding(tokens, source.embedding(torch.float32)).requires_grad_()
    for index in range(config.num_hidden_layers):
        def tap(name, x, y, index=index):
            y.retain_grad()
            outputs[index, name] = y
            return y
        x = forward.decoder_layer(x, {**source.layer(index, torch.float32), "tap": tap}, config, rope)
    (x * towards).sum().backward()
    assert len(outputs) == config.num_hidden_layers * len(names)
    for index, layer in enumerate(found):
        for stage, readers in READERS.items():
            wanted = torch.cat([outputs[index, name].grad for name in readers], -1).square().mean(-1).sqrt()
            assert layer[stage].shape == tokens.shape
            assert torch.allclose(layer[stage], wanted / wanted.mean(), rtol=1e-3, atol=1e-6)


def test_labels_are_seeded(tmp_path):
    source, tokens = open_model(save_tiny(tmp_path / "m", "llama")), random_tokens(3, 12)
    first, second, other = (token_weights(source, tokens, seed=seed)[0]["q_proj"] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_weights_reach_every_moment(tmp_path):
    """Weights of 1 change nothing; those of 2 and 0 count one window twice and another not at all."""
    source, tokens = open_model(save_tiny(tmp_path / "m", "llama")), random_tokens(4, 12)
    weights = torch.tensor([2.0, 0, 1, 1])[:, None].expand(4, 12)

    def moments(tokens, weights):
        options = QuantizerOptions({}, asymmetric="residual", batch_size=2)
        run = SequentialQuantizer(RotatedModel(source, Rotation("none")), options, tokens,
                                  guidance=weights and [weights])
        run._start(1.1 * source.embedding(torch.float32).numpy())
        width = source.config.hidden_size
        both = run._observe(lambda x: x, lambda x: x + 1, width, True, weights and weights["q_proj"])
        return [part.mean() for moment in both for part in vars(moment).values()
                if isinstance(part, MeanProduct)]

    plain, ones = moments(tokens, None), moments(tokens, {"q_proj": torch.ones(4, 12)})
    assert all(torch.equal(a, b) for a, b in zip(plain, ones, strict=True))
    double, weighted = moments(tokens[[0, 0, 2, 3]], None), moments(tokens, {"q_proj": weights})
    for wanted, found in zip(double, weighted, strict=True):
        assert torch.allclose(wanted, found, rtol=1e-5, atol=1e-6)


def test_weights_leave_the_peak_alone():
    """It is that of the activations, which a runtime has to hold."""
    x, weights = torch.tensor([[[3.0, -7.0], [1.0, 2.0]]]), torch.tensor([[0.01, 9.0]])
    moments = Moments(2, "cpu")
    moments.add(x, weights=weights)
    assert float(moments.peak) == 7


def test_guided_quantisation(tmp_path, text):
    fields = {**FAST, "rotation": "none", "calibration": text}
    folder = save_model(tmp_path / "model", "smollm2")
    paths = [pipeline.quantize(folder, tmp_path / kind, guidance=kind, **fields) for kind in ("none", "tokens")]
    plain, guided = (QuantizedCheckpoint(path).get("layers.1.o_proj.weight").codes for path in paths)
    assert (plain != guided).any()


@pytest.mark.parametrize("fields", [{"guidance": "rows"}, {"guidance": "tokens", "quantizer": "rtn"}])
def test_what_cannot_be_guided_is_refused(fields):
    with pytest.raises(InputError, match="--guidance"):
        Recipe(**fields)
