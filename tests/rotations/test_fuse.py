"""Rotated models compute the same function: every family, every combination, float64 and float32."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.rotation import Rotation, scale_widths
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


SCALES = ("attn_norm", "mlp_norm", "value", "up")


def with_scales(rotation, config, names, seed=5):
    """`rotation` with positive scales between about 1/8 and 8 for `names`."""
    generator, widths = torch.Generator().manual_seed(seed), scale_widths(config)
    rotation.scales = {name: torch.randn(config.num_hidden_layers, widths[name], generator=generator,
                                         dtype=torch.float64).mul(0.7).exp() for name in names}
    return rotation


def largest_difference(model, source, tokens=None) -> float:
    """Of the logits in float64, in units of the largest logit."""
    tokens = random_tokens(1, 12) if tokens is None else tokens
    want, got = (forward.logits(m, tokens, dtype=torch.float64) for m in (source, model))
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("names", [*((name,) for name in SCALES), SCALES], ids=[*SCALES, "all"])
def test_channel_scales_are_invisible(names, case, tmp_path):
    """Each alone and all together; without rotations, with each of R1, R2, R4, and with all."""
    source = open_model(save_tiny(tmp_path / "m", case))
    for which, blocks in (("", {}), ("r1", {}), ("r2", {}), ("", {"r4_block": 32}),
                          ("r1,r2", {"r3_block": 16, "r4_block": 32})):
        rotation = with_scales(rotation_for(source.config, which, **blocks), source.config, names)
        assert largest_difference(RotatedModel(source, rotation), source) <= 1e-9, (which, blocks)


@pytest.mark.parametrize(("name", "changed"), [
    ("attn_norm", {"attn_norm.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight"}),
    ("mlp_norm", {"mlp_norm.weight", "gate_proj.weight", "up_proj.weight"}),
    ("value", {"v_proj.weight", "v_proj.bias", "o_proj.weight"}), ("up", {"up_proj.weight", "up_proj.bias",
                                                                          "down_proj.weight"})])
def test_what_a_scale_changes(name, changed, tmp_path):
    source = open_model(save_tiny(tmp_path / "m", "llama_bias"))
    rotated = RotatedModel(source, with_scales(Rotation("optrot+"), source.config, [name]))
    before, after = source.layer(1, torch.float64), rotated.layer(1, torch.float64)
    assert {key for key in before if not torch.equal(before[key], after[key])} == changed
    if name.endswith("norm"):
        torch.testing.assert_close(after[f"{name}.weight"], rotated.rotation.scales[name][1], rtol=0, atol=0)
    assert rotated.config.tie_word_embeddings


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_on_one_side_only_is_noticed(name, tmp_path):
    """Exchanging two channels' scales after fusing, on the writer alone, changes the logits."""
    source = open_model(save_tiny(tmp_path / "m", "llama"))
    rotated = RotatedModel(source, with_scales(rotation_for(source.config), source.config, [name]))
    writer = {"value": "v_proj.weight", "up": "up_proj.weight"}.get(name, f"{name}.weight")
    layer, inner = rotated.layer(0, torch.float64), rotated.layer
    layer[writer] = layer[writer].roll(1, 0)
    rotated.layer = lambda index, dtype=torch.float32: layer if index == 0 else inner(index, dtype)
    assert largest_difference(rotated, source) > 1e-2


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
