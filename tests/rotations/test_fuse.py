"""Rotated models compute the same function: every family, every combination, float64 and float32."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.rotation import Rotation
from tests.tiny_models import CASES, random_tokens, save_tiny


def rotation_for(config, which="r1,r2", seed=0, **blocks):
    return initial_rotation(config, set(which.split(",")), torch.Generator().manual_seed(seed), **blocks)


@pytest.mark.parametrize("case", CASES)
def test_rotation_is_invisible(case, tmp_path):
    source = open_model(save_tiny(tmp_path / "m", case))
    tokens = random_tokens()
    rotated = RotatedModel(source, rotation_for(source.config, r3_block=16, r4_block=32))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        want = forward.logits(source, tokens, dtype=dtype)
        got = forward.logits(rotated, tokens, dtype=dtype)
        assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())


@pytest.mark.parametrize("which", ["r1", "r2"])
def test_each_rotation_alone(which, tmp_path):
    source = open_model(save_tiny(tmp_path / "m", "qwen2"))
    rotated = RotatedModel(source, rotation_for(source.config, which))
    tokens = random_tokens()
    want = forward.logits(source, tokens, dtype=torch.float64)
    got = forward.logits(rotated, tokens, dtype=torch.float64)
    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())
    assert rotated.config.tie_word_embeddings is (which == "r2")
    same = torch.equal(rotated.layer(0)["attn_norm.weight"], source.layer(0)["attn_norm.weight"])
    assert same is (which == "r2"), "norm gains are folded by R1 and only by R1"


def test_weights_really_change(tmp_path):
    source = open_model(save_tiny(tmp_path / "m", "llama"))
    rotated = RotatedModel(source, rotation_for(source.config, r4_block=32))
    before, after = source.layer(1), rotated.layer(1)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert (before[f"{name}.weight"] - after[f"{name}.weight"]).abs().max() > 0.05


def test_a_missing_half_is_noticed(tmp_path):
    """The invariance test has teeth: dropping the online half of R4 changes the logits."""
    source = open_model(save_tiny(tmp_path / "m", "llama"))
    rotated = RotatedModel(source, rotation_for(source.config, r4_block=32))
    rotated.r4_block = None
    want, got = (forward.logits(m, random_tokens(), dtype=torch.float64) for m in (source, rotated))
    assert float((got - want).abs().max()) > 1e-2 * float(want.abs().max())


def test_constant_final_gain_keeps_embeddings_tied(tmp_path):
    source = open_model(save_tiny(tmp_path / "m", "smollm2"))
    gain = torch.full((source.config.hidden_size,), 1.5, dtype=torch.float64)
    source.final_norm = lambda dtype=torch.float32: gain.to(dtype)
    rotated = RotatedModel(source, rotation_for(source.config))
    assert rotated.config.tie_word_embeddings and rotated.lm_head() is None
    want, got = (forward.logits(m, random_tokens(), dtype=torch.float64) for m in (source, rotated))
    assert float((got - want).abs().max()) <= 1e-9 * float(want.abs().max())


def test_saved_rotation_comes_back_and_is_checked(tmp_path):
    config = open_model(save_tiny(tmp_path / "m", "llama")).config
    rotation = rotation_for(config, r4_block=32)
    rotation.save(tmp_path / "r.safetensors")
    again = Rotation.load(tmp_path / "r.safetensors")
    assert torch.equal(again.r1, rotation.r1) and torch.equal(again.r2, rotation.r2)
    assert again.describe() == rotation.describe()
    other = open_model(save_tiny(tmp_path / "o", "tinyllama")).config
    with pytest.raises(InputError, match="another model"):
        again.validate(other)
    again.r1 = again.r1 * 1.001
    with pytest.raises(InputError, match="not orthogonal"):
        again.validate(config)
    (tmp_path / "junk").write_bytes(b"12345678 not a rotation")
    with pytest.raises(InputError, match="not a saved rotation"):
        Rotation.load(tmp_path / "junk")


@pytest.mark.parametrize("block", [48, 64, 1])
def test_bad_r4_block(block, tmp_path):
    source = open_model(save_tiny(tmp_path / "m", "llama"))
    with pytest.raises(InputError, match="power of two that divides 160"):
        RotatedModel(source, Rotation("hadamard", r4_block=block))
