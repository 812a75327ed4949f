"""`optrot-edge rotate` and the report beside its rotation: what it writes, refuses and leaves behind."""

from __future__ import annotations

import json

import pytest

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.rotations.rotation import Rotation
from tests.cli_runner import left, refused, run_ok
from tests.road import FAST, FAST_OPTIONS, save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("report") / "model", "smollm2")


def test_the_command_writes_all_three(model, text, tmp_path, capfd):
    run_ok("rotate", model, "--out", tmp_path / "r.safetensors", "--calibration", text, "--json", *FAST_OPTIONS)
    printed = json.loads(capfd.readouterr().out)
    assert left(tmp_path) == ["r.json", "r.png", "r.safetensors"]
    report = json.loads((tmp_path / "r.json").read_text())
    assert printed["report"].endswith("r.json") and printed["figure"].endswith("r.png")
    assert printed["matrices"] == report["summary"] and "layer_loss" not in printed
    assert report["rotation"] == "optrot" and report["applied"] == ["r1", "r2"]
    assert len(report["recipe"]["layer_loss"]) == 2 and len(report["layers"]) == 14
    expected = {"source": str(text), "nsamples": FAST["nsamples"], "seqlen": FAST["seqlen"], "tokens": 128, "seed": 0}
    assert expected.items() <= report["calibration"].items() and report["notes"] == []
    assert all(row["after"]["mu_h"] >= 1 for row in report["layers"])
    refused(capfd, "rotate", model, "--out", tmp_path / "other", "--calibration", text, "--rotation", "none",
            says="nothing to save")


def test_the_command_without_text(model, tmp_path, capfd):
    run_ok("rotate", model, "--out", tmp_path / "r.safetensors", "--calibration", "none", "--rotation", "hadamard")
    assert "no calibration text" in " ".join(capfd.readouterr().out.split())
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["calibration"] is None and report["layers"][0]["before"]["tr_d"] is None
    assert "μ_H and tr D are left out" in report["notes"][0]
    taken = tmp_path / "r.safetensors"
    taken.unlink()
    refused(capfd, "rotate", model, "--out", taken, "--calibration", "none", says="r.json exists")
    assert left(tmp_path) == ["r.json", "r.png"]


def test_mu_h_left_out_by_the_command(model, text, tmp_path):
    run_ok("rotate", model, "--out", tmp_path / "r.safetensors", "--calibration", text, "--rotation", "hadamard",
           "--no-mu-h", "-q", *FAST_OPTIONS)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["layers"][0]["after"]["mu_h"] is None and report["layers"][0]["after"]["tr_d"] > 0
    assert report["notes"] == ["μ_H is left out, as asked"]


def test_too_little_text_is_refused_before_the_work(model, text, tmp_path):
    with pytest.raises(InputError, match="64 calibration tokens cannot describe inputs of 96"):
        pipeline.rotate(model, tmp_path / "r.safetensors", report=True, calibration=text, nsamples=2, seqlen=32,
                        progress=lambda *_: pytest.fail("work had begun"))
    assert left(tmp_path) == []


@pytest.mark.parametrize("stage", ["collect inputs", "learn rotation", "measure matrices"])
def test_an_interrupt_leaves_whole_files_only(stage, model, text, tmp_path):
    for name in ("r.safetensors", "r.json", "r.png"):
        (tmp_path / name).write_bytes(b"old")

    def interrupt(name, *_):
        if name == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.rotate(model, tmp_path / "r.safetensors", report=True, overwrite=True, calibration=text,
                        progress=interrupt, **FAST)
    # once the new rotation is saved, the report of the old one is gone
    assert left(tmp_path) == (["r.safetensors"] if stage == "measure matrices" else ["r.json", "r.png",
                                                                                       "r.safetensors"])
    assert ((tmp_path / "r.safetensors").read_bytes() == b"old") is (stage != "measure matrices")


def test_a_report_that_fails_leaves_the_rotation(model, text, tmp_path, monkeypatch):
    def full(report, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optrot_edge.rotations.figure.draw", full)
    with pytest.raises(InputError, match="r.safetensors is saved, but not its report: cannot write .*r.png"):
        pipeline.rotate(model, tmp_path / "r.safetensors", report=True, calibration=text, **FAST)
    assert left(tmp_path) == ["r.safetensors"]
    assert Rotation.load(tmp_path / "r.safetensors").method == "optrot"


def test_the_library_reports_only_when_asked(model, tmp_path):
    pipeline.rotate(model, tmp_path / "r.safetensors", rotation="hadamard")
    assert left(tmp_path) == ["r.safetensors"]
