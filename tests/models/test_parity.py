"""The reader and the plain forward pass against transformers' own models, every family."""

import pytest
import torch

from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from tests.tiny_models import CASES, random_tokens, reference_model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(tiny, case):
    source = open_model(tiny(case))
    tokens = random_tokens(batch=3, length=40)
    reference = reference_model(tiny(case))
    expected = reference(tokens).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(logits(source, tokens), expected, atol=2e-5, rtol=0)

    frequencies = torch.tensor(source.config.rope_inv_freq(), dtype=torch.float64)
    torch.testing.assert_close(frequencies, reference.model.rotary_emb.inv_freq.double(), atol=0, rtol=1e-6)
    expected = reference_model(tiny(case), torch.float64, frequencies)(tokens).logits
    assert expected.dtype == torch.float64
    actual = logits(source, tokens, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_shards_hold_the_same_model(tiny, case):
    whole, shards = open_model(tiny(case)), open_model(tiny(case, shards=True))
    assert len(shards.files) > len(whole.files) + 2
    assert whole.config.to_dict() | {"name": ""} == shards.config.to_dict() | {"name": ""}
    tokens = random_tokens()
    assert torch.equal(logits(whole, tokens), logits(shards, tokens))


@torch.no_grad()
def test_the_sliding_window_matters(tiny):
    source = open_model(tiny("mistral_window"))
    tokens = random_tokens(length=40)
    windowed = logits(source, tokens)
    source.config.sliding_window = None
    difference = (logits(source, tokens) - windowed).abs().amax(dim=(0, 2))
    assert difference[:8].max() == 0 and difference[8:].min() > 1e-3
