"""MLX folders on the command line."""

from __future__ import annotations

import json

import pytest

from tests.cli_runner import refused, run_ok
from tests.mlx_models import edit_config

pytest.importorskip("mlx_lm")
QUANTISED = {"quantize": True, "q_bits": 4, "q_group_size": 64}


@pytest.fixture
def package(mlx, copied):
    """A package that needs its own model file."""
    folder = edit_config(copied(mlx("wide", **QUANTISED)[1]), model_file="own.py", optrot={
        "format": "mlx", "format_version": 1, "rotation": "hadamard", "applied": ["r1", "r3"],
        "warnings": ["layer 1 is hard"]})
    (folder / "own.py").write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    return folder


def test_eval(package, mlx, text, capfd):
    asked = ["eval", package, "--reference", mlx("wide")[0], "--text", text, "--windows", "2", "--window", "32"]
    refused(capfd, *asked, says="pass --trust-remote-code")
    reports = []
    for options in ([], ["--kv-bits", "4"]):
        run_ok(*asked, "--trust-remote-code", *options, "--json", "--quiet")
        reports.append(json.loads(capfd.readouterr().out))
    plain, four = reports
    assert plain["runtime"].startswith("mlx (mlx-lm") and four["kv_bits"] == 4
    assert four["kl_mean"] != plain["kl_mean"] > 0
    run_ok(*asked, "--trust-remote-code", "--kv-bits", "8")
    assert "keys and values in 8 bits" in " ".join(capfd.readouterr().out.split())
    refused(capfd, *asked, "--trust-remote-code", "--kv-bits", "6", says="4 or 8")
    refused(capfd, *asked, "--trust-remote-code", "--backend", "torch", says="runs in mlx only")


def test_chat(package, mlx, files, capfd):
    refused(capfd, "chat", package, "Hello", says="pass --trust-remote-code")
    run_ok("chat", package, "Hello", "--max-tokens", "8", "--trust-remote-code", "--json")
    said = json.loads(capfd.readouterr().out)["answer"]
    run_ok("chat", mlx("wide", **QUANTISED)[1], "Hello", "--max-tokens", "8", "--quiet")
    assert capfd.readouterr().out == said + "\n" and said
    run_ok("chat", files["gguf"], "Hello", "--max-tokens", "8")
    assert capfd.readouterr().out.strip()
    refused(capfd, "chat", files["gguf"], "Hello", "--trust-remote-code", says="is for MLX packages")
    refused(capfd, "chat", files["checkpoint"], "Hello", says="gives logits only")


def test_inspect(package, capfd):
    run_ok("inspect", package, "--json")
    about = json.loads(capfd.readouterr().out)
    assert (about["kind"], about["rotation"], about["applied"]) == ("MLX package", "hadamard", ["r1", "r3"])
    assert about["needs_trust_remote_code"] and "4-bit g64" in about["types"]
    run_ok("inspect", package)
    out = capfd.readouterr().out
    assert "4-bit g64" in out and "warning: layer 1 is hard" in out
