"""Covariances of the inputs: collected from the model, and carried through a rotation exactly."""

from __future__ import annotations

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import forward, open_model
from optrot_edge.rotations import covariance
from optrot_edge.rotations.covariance import INPUTS, check_tokens, collect, rotate_covariances
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.rotation import Rotation, scale_widths
from tests.rotations.test_fuse import rotation_for
from tests.tiny_models import random_tokens

TOKENS = random_tokens(6, 32)
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


def covariances_of_inputs(model, index: int, tokens=TOKENS) -> dict[str, torch.Tensor]:
    """E[xxᵀ] of what layer `index` of `model` really reads, gains and online rotations included, in float64."""
    config, found = model.config, {}
    rope = forward.rope_tables(config, tokens.shape[1], dtype=torch.float64)
    r3, r4 = getattr(model, "r3_block", None), getattr(model, "r4_block", None)
    x = torch.nn.functional.embedding(tokens, model.embedding(torch.float64))
    for i in range(index + 1):
        layer = model.layer(i, torch.float64)
        found["attn"] = forward.rms_norm(x, layer["attn_norm.weight"], config.rms_norm_eps)
        found["o"] = forward.attention_context(found["attn"], layer, config, rope, r3_block=r3)
        x = x + forward.linear(found["o"], layer, "o_proj")
        found["mlp"] = forward.rms_norm(x, layer["mlp_norm.weight"], config.rms_norm_eps)
        found["down"] = forward.mlp_hidden(found["mlp"], layer, r4_block=r4)
        x = x + forward.linear(found["down"], layer, "down_proj")
    return {name: (part.flatten(0, 1).T @ part.flatten(0, 1)) / tokens.numel() for name, part in found.items()}


def assert_same(found: dict, expected: dict, tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys() == INPUTS.keys()
    for name, want in expected.items():
        assert float((found[name] - want).norm() / want.norm()) < tolerance, name


@pytest.mark.parametrize("case", ["llama_bias", "qwen3", "mistral_window"])
def test_collected_from_what_the_linears_read(case, tiny):
    source = open_model(tiny(case))
    with collect(source, TOKENS, batch_size=4) as covariances:
        assert covariances.tokens == TOKENS.numel() and covariances.layers == 2
        for index in range(2):
            native = source.layer(index)
            found = rotate_covariances(covariances.layer(index), Rotation("none"), index, native, source.config)
            assert_same(found, covariances_of_inputs(source, index))
    assert not covariances.folder.exists()


def test_norm_inputs_are_stored_without_their_gain(tiny):
    source = open_model(tiny("llama"))
    with collect(source, TOKENS) as covariances:
        stored = covariances.layer(1)
    assert float(stored["attn"].trace()) == pytest.approx(source.config.hidden_size, rel=1e-3)
    assert float(stored["mlp"].trace()) == pytest.approx(source.config.hidden_size, rel=1e-3)


@pytest.mark.parametrize("case", ["llama_bias", "qwen3", "mistral_window"])
@pytest.mark.parametrize("which", ["r1", "r2", "r1,r2"])
@pytest.mark.parametrize("r4_block", [None, 32])
def test_rotated_without_collecting_again(case, which, r4_block, tiny):
    source = open_model(tiny(case))
    rotation = rotation_for(source.config, which, r3_block=16, r4_block=r4_block)
    rotated = RotatedModel(source, rotation)
    with collect(source, TOKENS) as covariances:
        stored = covariances.layer(1)
    found = rotate_covariances(stored, rotation, 1, rotated.layer(1), source.config)
    assert_same(found, covariances_of_inputs(rotated, 1))
    assert (found["o"] is stored["o"]) is ("r2" not in which) and (found["down"] is stored["down"]) is (not r4_block)


@pytest.mark.parametrize("case", ["llama_bias", "qwen3"])
@pytest.mark.parametrize("which", ["r1", "r1,r2", ""])
@pytest.mark.parametrize("r4_block", [None, 32])
@pytest.mark.parametrize("names", [["attn_norm"], ["mlp_norm"], ["value"], ["up"],
                                   ["attn_norm", "mlp_norm", "value", "up"]])
def test_channel_scales(case, which, r4_block, names, tiny):
    """Gains kept after the rotation scale the norms' inputs, scales between v and o, up and down the others'."""
    source, generator = open_model(tiny(case)), torch.Generator().manual_seed(3)
    rotation = rotation_for(source.config, which, r4_block=r4_block)
    layers, widths = source.config.num_hidden_layers, scale_widths(source.config)
    rotation.scales = {name: 0.5 + torch.rand(layers, widths[name], generator=generator, dtype=torch.float64)
                       for name in names}
    rotated = RotatedModel(source, rotation)
    with collect(source, TOKENS) as covariances:
        found = rotate_covariances(covariances.layer(1), rotation, 1, rotated.layer(1), source.config)
    assert_same(found, covariances_of_inputs(rotated, 1))


def test_token_counts():
    with pytest.raises(InputError, match="95 calibration tokens cannot describe inputs of 96 dimensions.*--nsamples"):
        check_tokens(95, 96)
    with pytest.warns(UserWarning, match="1919 calibration tokens are few.*1920 would be better"):
        check_tokens(1919, 96)


def test_enough_tokens_pass_silently(recwarn):
    check_tokens(1920, 96)
    assert not recwarn.list


@pytest.mark.parametrize("failure", ["interrupt", "overflow", "disk"])
def test_nothing_is_left_behind(failure, tiny, tmp_path, monkeypatch):
    source = open_model(tiny("llama"))

    def progress(done, total):
        assert len(list(tmp_path.iterdir())) == 1  # the files are there while the work goes on
        if failure == "interrupt":
            raise KeyboardInterrupt

    if failure == "overflow":
        inner = source.layer
        source.layer = lambda index, dtype: {name: tensor * (1e30 if index and name == "up_proj.weight" else 1)
                                             for name, tensor in inner(index, dtype).items()}
    if failure == "disk":
        def full(*_):
            raise OSError("No space left on device")
        monkeypatch.setattr(covariance, "save_file", full)
    overflow = "layers.1.down_proj: calibration .*non-finite.* layers.1.up_proj.weight, stored as F32"
    expected, says = {"interrupt": (KeyboardInterrupt, None), "overflow": (InputError, overflow),
                      "disk": (InputError, "cannot write covariances to .*No space left")}[failure]
    with pytest.raises(expected, match=says):
        collect(source, TOKENS, folder=tmp_path, progress=progress)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tiny, tmp_path):
    with pytest.raises(InputError, match="cannot make a temporary folder in .*absent"):
        collect(open_model(tiny("llama")), TOKENS, folder=tmp_path / "absent")
