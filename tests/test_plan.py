"""`--dry-run`: sizes to the byte, what would be tried, and refusals, with nothing written."""

from __future__ import annotations

import json

import gguf
import pytest

from optrot_edge import plan
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.models import open_model
from optrot_edge.recipe import Recipe
from tests.cli_runner import RTN, left, refused, run_ok
from tests.road import save_model
from tests.tiny_models import CASES


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("options", [[], ["--rotation", "none", "--type", "q5_1", "--embedding-type", "f16"],
                                     ["--rotate", "r2", "--type", "q4_1", "--head-type", "f32"]])
def test_dry_run_knows_the_bytes(case, options, tmp_path, capfd):
    """Tied and untied, with biases, q/k norms and rope factors: the bytes of every tensor, exactly."""
    model, out = save_model(tmp_path / "model", case), tmp_path / "m.gguf"
    options = [*RTN[:4], "--rotation", "hadamard", *options]
    run_ok("export", model, "--out", out, "--dry-run", "--json", *options)
    found = json.loads(capfd.readouterr().out)
    assert left(tmp_path) == ["model"]
    run_ok("export", model, "--out", out, "--checkpoint", tmp_path / "c", "--json", *options)
    summary = json.loads(capfd.readouterr().out)
    reader = gguf.GGUFReader(out)
    assert found["bytes"] == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert found["bits_per_weight"] == pytest.approx(summary["bits_per_weight"], rel=1e-12)
    assert found["unties_head"] == (case in ("llama_bias", "smollm2", "qwen2", "qwen3_tied")
                                   and "output.weight" in [tensor.name for tensor in reader.tensors])
    assert found["family"] == QuantizedCheckpoint(tmp_path / "c").manifest["model"]["family"]
    assert found["peak_memory_bytes"] > 0 and found["seconds"] > 0
    run_ok("export", tmp_path / "c", "--out", tmp_path / "x.gguf", "--dry-run", "--json")
    assert json.loads(capfd.readouterr().out)["bytes"] == found["bytes"]
    assert left(tmp_path) == ["c", "m.gguf", "model"]


def test_dry_run_of_quantize(files, tmp_path, capfd):
    run_ok("quantize", files["model"], "--out", tmp_path / "c", "--dry-run", "--json", "--type", "int3-g32-zero",
           "--rotation", "optrot", "--rotate", "r1,r2,r4", "--r4-block", 32)
    found = json.loads(capfd.readouterr().out)
    assert found["rotated"] == ["r1", "r2", "r4"] and found["types"]["body"] == "int3-g32-zero"
    assert left(tmp_path) == []


@pytest.mark.parametrize(("case", "largest", "tried", "rotated"), [
    ("smollm2", "OptRot+ (R2, scales)", ["none", "OptRot+ (R2, scales)"], ["r2"]),
    ("llama", "OptRot+ (R1, R2, scales)",
     ["none", "OptRot+ (R2, scales)", "OptRot", "OptRot+ (R1, R2, scales)"], ["r1", "r2"])])
def test_dry_run_of_auto_says_that_it_decides_later(case, largest, tried, rotated, tmp_path, capfd):
    """Sizes are those of the largest arm that is tried; the time is that of all."""
    model = save_model(tmp_path / "model", case)
    start = ["export", model, "--out", tmp_path / "m.gguf", "--dry-run", "--json"]
    run_ok(*start)
    found = json.loads(capfd.readouterr().out)
    assert (found["rotation"], found["arms"], found["rotated"]) == ("auto", tried, rotated)
    assert found["auto"].startswith(f"measures {', '.join(tried)}; sizes and rotations here are those of {largest}")
    assert ("OptRot not tried: R1 unties the head" in found["auto"]) == (case == "smollm2")
    run_ok(*start, "--rotation", "optrot+", "--rotate", ",".join(rotated))
    one = json.loads(capfd.readouterr().out)
    assert one["bytes"] == found["bytes"] and one["unties_head"] is found["unties_head"] is False
    run_ok(*start[:-1])
    assert "auto" in capfd.readouterr().out
    assert left(tmp_path) == ["model"]


def test_the_plan_counts_the_learning(tmp_path):
    """More steps, more windows, more arms: more operations."""
    source = open_model(save_model(tmp_path / "model", "llama"))

    def flops(applied=("r1", "r2"), **fields):
        return plan._effort(source.config, Recipe(**fields), list(applied))[1]

    none, plus = flops((), rotation="none"), flops(rotation="optrot+")
    assert none < flops(rotation="optrot") and none < plus < flops(rotation="optrot+", plus_steps=90)
    assert flops(rotation="optrot+", rotate="r2") < plus
    assert plan._statistics_flops(source.config, Recipe(nsamples=256)) > plan._statistics_flops(source.config, Recipe())


def test_the_plan_counts_guidance_and_distillation(tmp_path):
    source = open_model(save_model(tmp_path / "model", "llama"))
    assert plan._end_loss_effort(source.config, Recipe(guidance="tokens"))[0] > 0
    efforts = [plan._end_loss_effort(source.config, Recipe(distill=epochs))[0] for epochs in (0, 1, 4)]
    assert efforts[0] == 0 < efforts[1] < efforts[2] / 3


def test_dry_run_with_a_saved_rotation(files, tmp_path, capfd):
    run_ok("quantize", files["model"], "--out", tmp_path / "c", "--dry-run", "--json", "--rotation", files["rotation"])
    found = json.loads(capfd.readouterr().out)
    assert found["rotated"] == ["r1", "r2"] and found["unties_head"] is True


def test_dry_run_refuses_what_the_run_would(files, tmp_path, capfd):
    start = ["export", files["model"], "--out", tmp_path / "m.gguf", "--dry-run"]
    refused(capfd, *start, "--rotate", "r1,r3", says="--rotate r3")
    refused(capfd, *start, "--type", "int4-g32-sym", says="int4-g32-sym")
    refused(capfd, *start, "--seqlen", 1000, says="--seqlen 1000")
    refused(capfd, "export", files["checkpoint"], "--out", tmp_path / "m.gguf", "--dry-run", "--type", "q8_0",
            says="--type cannot be changed now")
