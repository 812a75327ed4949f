"""The baselines on the whole road: rotate, quantize, plan and eval --activations, and what is refused."""

import json
import re

import pytest

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.baselines import BASELINES, ONLINE
from optrot_edge.rotations.rotation import Rotation
from tests.cli_runner import left, refused, run_ok

SHORT = {"nsamples": 8, "seqlen": 32, "e2e_steps": 2, "e2e_tokens": 64}
OPTIONS = [part for key, value in SHORT.items() for part in (f"--{key.replace('_', '-')}", str(value))]

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few", "ignore:.*lost")


@pytest.mark.parametrize("name", BASELINES)
def test_rotate_writes_a_rotation_and_its_report(name, files, tmp_path, capfd):
    run_ok("rotate", files["model"], "--out", tmp_path / "r.safetensors", "--rotation", name, "--calibration",
           files["text"], "--no-mu-h", "--json", *OPTIONS)
    printed = json.loads(capfd.readouterr().out)
    assert left(tmp_path) == ["r.json", "r.png", "r.safetensors"]
    recipe = json.loads((tmp_path / "r.json").read_text())["recipe"]
    assert len(recipe["loss_curve"]) == 2 and recipe["kept"] == (recipe["loss"] < recipe["loss_start"])
    assert printed["rotation"] == name and printed["applied"] == ["r1", "r2"] and "kept" in printed
    assert Rotation.load(tmp_path / "r.safetensors").method == name


@pytest.mark.parametrize("name", ["spinquant-a4", "ostquant", "kurtail"])
def test_quantize_and_evaluate(name, files, tmp_path, capfd):
    out = tmp_path / "c"
    pipeline.quantize(files["model"], out, rotation=name, calibration=str(files["text"]), **SHORT)
    manifest = QuantizedCheckpoint(out).manifest
    assert manifest["rotation"]["rotation"] == name and manifest["recipe"]["e2e_steps"] == 2
    common = ["--reference", files["model"], "--text", files["text"], "--windows", 2, "--window", 32, "--no-speed",
              "--json"]
    reports = {}
    for bits in (16, 8, 4):
        run_ok("eval", out, "--activations", bits, *common)
        reports[bits] = json.loads(capfd.readouterr().out)
    run_ok("eval", out, *common)
    plain = json.loads(capfd.readouterr().out)
    assert "activations" not in plain and plain["kl_mean"] == reports[16]["kl_mean"]
    assert reports[4]["activations"] == 4 and plain["kl_mean"] != reports[8]["kl_mean"] != reports[4]["kl_mean"]
    run_ok("eval", out, "--activations", 4, *common[:-1])
    assert re.search("activations rounded to .* 4 bits", capfd.readouterr().out)


def test_activations_are_for_torch(files, capfd):
    common = ["--reference", files["model"], "--text", files["text"], "--windows", 2, "--window", 32]
    refused(capfd, "eval", files["gguf"], "--activations", 8, *common, says="--activations is for torch-run packages")
    refused(capfd, "eval", files["checkpoint"], "--activations", 1, *common, says="activations of 1 bits")
    run_ok("eval", files["gguf"], "--activations", 8, "--backend", "torch", "--no-speed", "-q", *common)


@pytest.mark.parametrize("name", ONLINE)
def test_methods_that_no_package_can_hold(name, files, tmp_path, capfd):
    line = refused(capfd, "export", files["model"], "--out", tmp_path / "m.gguf", "--rotation", name,
                   says="cannot be fused into the weights")
    assert "`compare` only" in line and left(tmp_path) == []


@pytest.mark.parametrize(("fields", "says"), [
    ({"rotation": "spinquant", "calibration": "none", "quantizer": "rtn"}, "needs calibration text"),
    ({"rotation": "kurtail", "rotate": "r3"}, "learns R1 and R2, but --rotate names neither"),
    ({"rotation": "spinquant-w4", "type": "f16"}, "is for a quantised body"),
    ({"rotation": "spinquant", "e2e_steps": 0}, "--e2e-steps"),
    ({"rotation": "kurtail", "e2e_steps": 0}, "--e2e-steps"),
    ({"rotation": "spinquant", "e2e_tokens": 1}, "--e2e-tokens"),
    ({"rotation": "ostquant", "e2e_activations": 5}, "--e2e-activations 5: use 4, 8 or 16"),
    ({"rotation": "spinquant", "e2e_activations": 16}, "rounds nothing"),
    ({"rotation": "spinquant", "e2e_loss": "mse"}, "--e2e-loss mse: use cross-entropy or kl-top"),
    ({"rotation": "spinquant", "e2e_lr": float("nan")}, "--e2e-lr nan"),
    ({"rotation": "spinquant", "e2e_lr": -1.5}, "--e2e-lr -1.5: more than 0"),
])
def test_recipes_that_are_refused(fields, says):
    with pytest.raises(InputError, match=says):
        Recipe(**fields)


def test_torchrun_is_refused(files, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="spinquant runs in one process"):
        pipeline.rotate(files["model"], tmp_path / "r.safetensors", rotation="spinquant",
                        calibration=str(files["text"]), **SHORT)


def test_plans_grow_with_the_steps(files):
    for name in BASELINES:
        few, many = (pipeline.plan(files["model"], rotation=name, calibration=str(files["text"]),
                                   **SHORT | {"e2e_steps": steps}) for steps in (2, 200_000))
        assert many["seconds"] > few["seconds"] and many["bytes"] == few["bytes"], name


def test_a_float_body_can_be_rotated_for_its_activations(files):
    assert Recipe(rotation="spinquant", type="f16").end_to_end_options().activations == 8
    assert Recipe(rotation="ostquant", e2e_activations=4, scales=False).end_to_end_options().activations == 4
