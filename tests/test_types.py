"""Types of super-blocks from the command line: GPTQ onto them, fallbacks that are announced, sizes."""

from __future__ import annotations

import json

import gguf
import pytest

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.models import open_model
from optrot_edge.plan import check_widths
from optrot_edge.recipe import Recipe
from tests.cli_runner import RTN, refused, run_ok
from tests.exporters.test_gguf import check_logits
from tests.road import FAST_OPTIONS, save_model

NOTE = ("rows of 96 weights do not fill q4_k's super-blocks of 256 and are stored as q5_0, as llama-quantize does: "
        "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("wide") / "model", "wide")


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "iq4_xs", "mxfp4"])
def test_gptq_and_rotations_reach_llama_cpp(kind, wide, tmp_path, capfd):
    options = ["--type", kind, "--embedding-type", "iq4_nl", "--head-type", "q6_k", "--rotation", "hadamard",
               *FAST_OPTIONS]
    run_ok("export", wide, "--out", tmp_path / "m.gguf", "--dry-run", "--json", *options)
    plan = json.loads(capfd.readouterr().out)
    assert plan["types"] | {"norms and biases": "f32"} == {
        "body": kind, "embedding": "iq4_nl", "head": "q6_k", "norms and biases": "f32"}
    assert plan["notes"] == []
    run_ok("export", wide, "--out", tmp_path / "m.gguf", "--checkpoint", tmp_path / "c", "-q", *options)
    checkpoint = QuantizedCheckpoint(tmp_path / "c")
    assert {entry["grid"] for name, entry in checkpoint.manifest["tensors"].items() if "proj" in name} == {kind}
    assert plan["bytes"] == sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    largest, spread = check_logits(checkpoint, tmp_path / "m.gguf")
    assert spread < 0.03 and largest < 0.2


def test_fallback_is_announced(tmp_path, capfd):
    """In the dry run, the summary, the manifest and `inspect`."""
    model, options = save_model(tmp_path / "model", "smollm2"), ["--type", "q4_k", *RTN]
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--dry-run", "--json", *options)
    plan = json.loads(capfd.readouterr().out)
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--checkpoint", tmp_path / "c", "--json", *options)
    summary = json.loads(capfd.readouterr().out)
    manifest = QuantizedCheckpoint(tmp_path / "c").manifest
    assert plan["types"]["body"] == "q5_0" and plan["notes"] == summary["notes"] == manifest["notes"]
    assert manifest["notes"][0] == NOTE and "rows of 160" in manifest["notes"][1] and len(manifest["notes"]) == 2
    assert plan["bytes"] == sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert {entry.get("grid") for entry in manifest["tensors"].values()} == {"q5_0", "q8_0", None}
    run_ok("inspect", tmp_path / "c", "--json")
    about = json.loads(capfd.readouterr().out)
    assert about["notes"] == manifest["notes"] and about["types"]["q5_0"]["tensors"] == 14
    run_ok("export", model, "--out", tmp_path / "m.gguf", "--dry-run", *options)
    assert "are stored as q5_0, as llama-quantize does" in " ".join(capfd.readouterr().out.replace("│", " ").split())


def test_a_head_that_falls_back_is_named(tmp_path):
    source = open_model(save_model(tmp_path / "model", "llama"))
    notes = check_widths(source, Recipe(type="q8_0", head_type="q6_k", embedding_type="iq4_xs"))
    said = "rows of 96 weights do not fill {}'s super-blocks of 256 and are stored as {}, as llama-quantize does: {}"
    assert notes == [said.format("iq4_xs", "iq4_nl", "embed_tokens"), said.format("q6_k", "q8_0", "lm_head")]


def test_a_type_for_a_tied_embedding_is_said_to_be_unused(tmp_path, capfd):
    """R1 unties SmolLM2's head, whose final gain is not constant; without it there is one matrix for both."""
    model = save_model(tmp_path / "model", "smollm2")
    for head, said in (((), True), (("--head-type", "q5_0"), False)):
        out = tmp_path / f"c{len(head)}"
        run_ok("quantize", model, "--out", out, "--embedding-type", "q5_0", *head, "-q", *RTN)
        assert QuantizedCheckpoint(out).manifest["notes"] == [
            "--embedding-type q5_0 is not used: the embedding is the head's own matrix, q8_0 (--head-type)"] * said
    rotated = [*RTN[:-1], "hadamard"]
    run_ok("quantize", model, "--out", tmp_path / "c", "--embedding-type", "q5_0", "-q", *rotated)
    manifest = QuantizedCheckpoint(tmp_path / "c").manifest
    assert manifest["notes"] == [] and manifest["tensors"]["embed_tokens.weight"]["grid"] == "q5_0"


def test_mlx_grids_stay_in_checkpoints(wide, tmp_path, capfd):
    run_ok("quantize", wide, "--out", tmp_path / "c", "--type", "mlx-4bit-g64-bf16", "--head-type", "mlx-8bit-g32",
           "-q", *RTN)
    tensors = QuantizedCheckpoint(tmp_path / "c").manifest["tensors"]
    assert tensors["layers.0.up_proj.weight"]["grid"] == "mlx-4bit-g64-bf16"
    refused(capfd, "export", tmp_path / "c", "--out", tmp_path / "m.gguf", says="which GGUF cannot store")
    refused(capfd, "export", wide, "--out", tmp_path / "m.gguf", "--type", "mlx-4bit-g64", *RTN,
            says="GGUF stores q4_0, q4_1")
