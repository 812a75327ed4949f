"""OptRot+ along the whole road: learned, saved, reused, exported and run in real llama.cpp; and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.rotations.rotation import Rotation
from tests.cli_runner import left, refused
from tests.exporters.gguf_models import llama_logits
from tests.road import save_model
from tests.rotations.test_optrot_plus import make_uneven
from tests.test_pipeline import decoded_logits, length_of, original_logits, spread
from tests.tiny_models import CASES, random_tokens

PLUS = {"rotation": "optrot+", "plus_steps": 6, "nsamples": 16, "seqlen": 32}
SCALES = ["attn_norm", "mlp_norm", "up", "value"]
FEW = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """`model(case)`: folder of a tiny model with uneven channels, made once; do not write into it."""
    folders = {}

    def folder(case: str):
        if case not in folders:
            folders[case] = make_uneven(save_model(tmp_path_factory.mktemp(case) / "model", case))
        return folders[case]

    return folder


@FEW
@pytest.mark.parametrize("case", CASES)
def test_in_llama_cpp(case, model, tmp_path, text):
    """llama.cpp computes what the checkpoint's weights say, gains and channel scales included."""
    tokens = random_tokens(1, length_of(case))
    summary = pipeline.export(model(case), tmp_path / "m.gguf", checkpoint=tmp_path / "c", type="q8_0",
                              calibration=text, **PLUS)
    checkpoint = QuantizedCheckpoint(tmp_path / "c")
    rotation = checkpoint.manifest["rotation"]
    assert (rotation["rotation"], rotation["applied"], rotation["scales"]) == ("optrot+", ["r1", "r2"], SCALES)
    assert rotation["recipe"]["loss"] < rotation["recipe"]["loss_start"]
    assert (checkpoint.weights("layers.0.attn_norm.weight") != 1).all()  # the gains are there, not folded away
    largest, typical = spread(llama_logits(tmp_path / "m.gguf", tokens[0].numpy()),
                              decoded_logits(tmp_path / "c", tokens))
    assert typical < 0.06 and largest < 0.5  # llama.cpp rounds what it multiplies to 8 bits per block, too
    largest, typical = spread(decoded_logits(tmp_path / "c", tokens), original_logits(model(case), tokens))
    assert typical < 0.05 and largest < 0.3  # 8 bits: what is left of the original
    assert "auto" not in summary


@FEW
@pytest.mark.parametrize(("which", "scales", "applied"), [("r1,r2", True, ["r1", "r2"]), ("", True, []),
                                                          ("r2", False, ["r2"])])
def test_a_saved_rotation_is_reused(which, scales, applied, model, tmp_path, text):
    """Learning inside `quantize` and before it give the same weights, also for channel scales alone."""
    recipe = {**PLUS, "calibration": text, "rotate": which, "scales": scales}
    saved = tmp_path / "r.safetensors"
    pipeline.rotate(model("qwen2"), saved, **recipe)
    assert (Rotation.load(saved).applied, bool(Rotation.load(saved).scales)) == (applied, scales)
    pipeline.quantize(model("qwen2"), tmp_path / "direct", **recipe)
    reuse = {"nsamples": 16, "seqlen": 32, "calibration": text, "rotation": saved}
    if which == "r2":
        with pytest.raises(InputError, match="holds r2; pass --rotate r2"):
            pipeline.quantize(model("qwen2"), tmp_path / "reused", **reuse)
        reuse["rotate"] = "r2"
    pipeline.quantize(model("qwen2"), tmp_path / "reused", **reuse)
    direct, reused = QuantizedCheckpoint(tmp_path / "direct"), QuantizedCheckpoint(tmp_path / "reused")
    assert direct.names == reused.names
    for name in direct.names:
        np.testing.assert_array_equal(direct.weights(name), reused.weights(name))
    pipeline.quantize(model("qwen2"), tmp_path / "plain", **reuse | {"rotation": "none"})
    plain = QuantizedCheckpoint(tmp_path / "plain").weights("layers.0.up_proj.weight")
    assert not np.array_equal(plain, reused.weights("layers.0.up_proj.weight")) or not scales
    tokens = random_tokens(1, 24)
    pipeline.export(tmp_path / "reused", tmp_path / "m.gguf")
    largest, typical = spread(llama_logits(tmp_path / "m.gguf", tokens[0].numpy()),
                              decoded_logits(tmp_path / "reused", tokens))
    assert typical < 0.06 and largest < 0.5  # llama.cpp rounds what it multiplies to 8 bits per block, too


@FEW
def test_scales_of_another_model_are_refused(model, tmp_path, text):
    pipeline.rotate(model("qwen2"), tmp_path / "r.safetensors", calibration=text, **PLUS | {"rotate": ""})
    with pytest.raises(InputError, match="made for another model"):
        pipeline.quantize(model("tinyllama"), tmp_path / "c", rotation=tmp_path / "r.safetensors", calibration=text,
                          nsamples=4, seqlen=32)
    assert left(tmp_path) == ["r.safetensors"]


@FEW
def test_objective_and_start_reach_the_learner(model, tmp_path, text):
    out = tmp_path / "r.safetensors"
    made = pipeline.rotate(model("qwen2"), out, calibration=text, plus_objective="plain", plus_start="hadamard",
                           seed=3, **PLUS)
    assert made.recipe["objective"] == "plain" and made.recipe["steps"] == 6 and made.recipe["seed"] == 3
    assert "r1_start" in made.recipe and made.recipe.get("start") != "native"
    native = pipeline.rotate(model("qwen2"), out, overwrite=True, calibration=text, **PLUS)
    assert native.recipe["start"] == "native" and native.recipe["objective"] == "grid"
    eye = torch.eye(len(native.r1), dtype=torch.float64)
    assert (native.r1 - eye).abs().max() < 0.3 < (made.r1 - eye).abs().max()


@pytest.mark.parametrize("command", ["rotate", "quantize", "export"])
def test_too_few_tokens(command, model, tmp_path, text):
    """One per dimension is the least, twenty are advised."""
    def run(nsamples):
        getattr(pipeline, command)(model("qwen2"), tmp_path / "out", calibration=text,
                                   **PLUS | {"nsamples": nsamples, "seqlen": 95, "plus_steps": 1})

    with pytest.raises(InputError, match="95 calibration tokens cannot describe inputs of 96 dimensions; "
                                         "at least 96, better 1920 are needed: raise --nsamples"):
        run(1)
    assert left(tmp_path) == []
    with pytest.warns(UserWarning, match="190 calibration tokens are few for inputs of 96 dimensions; 1920 would be"):
        run(2)


def test_enough_tokens_are_not_warned_of(model, tmp_path, text, recwarn):
    pipeline.rotate(model("qwen2"), tmp_path / "r", calibration=text, **PLUS | {"nsamples": 60, "plus_steps": 1})
    assert not [w for w in recwarn if "tokens" in str(w.message)]


def test_no_text_no_optrot_plus(model, tmp_path, capfd):
    for rotation in ("auto", "optrot+"):
        refused(capfd, "quantize", model("qwen2"), "--out", tmp_path / "c", "--rotation", rotation,
                "--quantizer", "rtn", "--calibration", "none", says=f"--rotation {rotation} needs calibration text")
    refused(capfd, "rotate", model("qwen2"), "--out", tmp_path / "r", "--rotation", "optrot+", "--calibration", "none",
            says="--rotation optrot+ needs calibration text")
    assert left(tmp_path) == []


@pytest.mark.parametrize(("options", "says"), [
    (["--rotation", "auto"], "--rotation auto quantises to choose; use it with quantize or export"),
    (["--rotation", "optrot+", "--no-scales", "--rotate", "r3"], "names neither"),
    (["--rotation", "optrot+", "--plus-objective", "best"], "--plus-objective best"),
    (["--rotation", "optrot+", "--plus-start", "zero"], "--plus-start zero"),
    (["--rotation", "optrot+", "--plus-steps", 0], "--plus-steps"),
    (["--rotation", "optrot+", "--type", "f16"], "is for a quantised body"),
    (["--rotation", "optrot+", "--nsamples", 1, "--seqlen", 95], "95 calibration tokens cannot")])
def test_refusals_of_rotate(options, says, model, tmp_path, capfd, text):
    refused(capfd, "rotate", model("qwen2"), "--out", tmp_path / "r", "--calibration", text, *options, says=says)
    assert left(tmp_path) == []


@pytest.mark.parametrize("rank", ["0", "1"])
def test_refused_under_torchrun(rank, model, tmp_path, capfd, text, monkeypatch):
    """On every process, and before any work."""
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    refused(capfd, "rotate", model("qwen2"), "--out", tmp_path / "r", "--calibration", text, "--rotation", "optrot+",
            says="--rotation optrot+ runs in one process; start it without torchrun")
    with pytest.raises(InputError, match="runs in one process"):
        pipeline.rotate(model("qwen2"), tmp_path / "r", calibration=text, progress=lambda *_: pytest.fail("began"),
                        **PLUS)
    assert left(tmp_path) == []
