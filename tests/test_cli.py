"""The command line: what it prints, what it writes, and what inspecting shows."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import gguf
import pytest

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.quantize.calibration import builtin_text
from optrot_edge.runtime.reference import read_reference
from optrot_edge.runtime.text import text_sha256
from tests.cli_runner import RTN, child, left, refused, run, run_ok
from tests.road import FAST_OPTIONS, save_model

COMMANDS = ("export", "quantize", "rotate", "eval", "chat", "reference", "inspect", "doctor")


# what is printed

def test_help_in_a_process():
    done = child("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capfd):
    assert run(command, "--help") == 0
    out, err = capfd.readouterr()
    assert "Usage" in out and "--json" in out and "--quiet" in out and err == ""


def test_no_command(capfd):
    assert run() == 2
    assert "export" in capfd.readouterr().out


def test_importing_the_command_line_is_light():
    code = "import sys, optrot_edge.cli; print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


JSON_KEYS = {
    "doctor": {"rows"}, "inspect checkpoint": {"bits_per_weight", "layers_snr_db", "types"},
    "inspect gguf": {"architecture", "file_type", "types", "context_length"}, "inspect model": {"family", "bytes"},
    "inspect rotation": {"rotation", "applied", "r1_shape"},
    "export": {"path", "bytes", "bits_per_weight", "file_type"}, "export dry": {"bytes", "seconds", "rotated"},
    "quantize": {"kind", "rotation", "bits_per_weight"}, "rotate": {"path", "applied", "loss"},
    "eval": {"kl_mean", "kl_p99", "ppl", "ppl_reference", "top1", "bytes"}, "reference": {"path", "windows", "bytes"},
    "eval checkpoint": {"kl_mean", "bits_per_weight"}, "export checkpoint": {"path", "notes"},
    "export checkpoint dry": {"bytes", "seconds", "rotated"}, "doctor probe": {"rows"},
}


def command_line(what: str, files: dict, tmp_path: Path) -> list:
    model, text = files["model"], ["--text", files["text"]]
    return {
        "doctor": ["doctor"], "inspect checkpoint": ["inspect", files["checkpoint"]],
        "inspect gguf": ["inspect", files["gguf"]], "inspect model": ["inspect", model],
        "inspect rotation": ["inspect", files["rotation"]],
        "export": ["export", model, "--out", tmp_path / "m.gguf", "--calibration", files["text"], *FAST_OPTIONS],
        "export dry": ["export", model, "--out", tmp_path / "m.gguf", "--dry-run"],
        "quantize": ["quantize", model, "--out", tmp_path / "c", *RTN],
        "rotate": ["rotate", model, "--out", tmp_path / "r.safetensors", *FAST_OPTIONS[:4]],
        "eval": ["eval", files["gguf"], "--reference", model, *text, "--windows", 2, "--window", 32],
        "eval checkpoint": ["eval", files["checkpoint"], "--reference", model, *text, "--windows", 1, "--window", 16],
        "export checkpoint": ["export", files["checkpoint"], "--out", tmp_path / "m.gguf"],
        "export checkpoint dry": ["export", files["checkpoint"], "--out", tmp_path / "m.gguf", "--dry-run"],
        "doctor probe": ["doctor", "--probe"],
        "reference": ["reference", model, *text, "--out", tmp_path / "ref.json.gz", "--windows", 2, "--window", 32],
    }[what]


@pytest.mark.parametrize("what", JSON_KEYS)
def test_json_and_nothing_else(what, files, tmp_path, capfd):
    assert run(*command_line(what, files, tmp_path), "--json") == 0
    result = json.loads(capfd.readouterr().out)
    assert JSON_KEYS[what] <= result.keys()
    if "path" in result and what != "inspect model":
        assert Path(result["path"]).exists()


@pytest.mark.parametrize("what", [what for what in JSON_KEYS if what != "doctor probe"])
def test_tables_and_quiet(what, files, tmp_path, capfd):
    assert run(*command_line(what, files, tmp_path)) == 0
    out, err = capfd.readouterr()
    assert out.strip() and "Traceback" not in err
    arguments = command_line(what, files, tmp_path)
    overwrite = ["--overwrite"] if "--out" in map(str, arguments) else []
    assert run(*arguments, "--quiet", *overwrite) == 0
    assert capfd.readouterr() == ("", "")


def table_of(text: str) -> dict[str, str]:
    """The rows of a printed table of two columns."""
    rows = (line.strip().strip("│").split("│") for line in text.splitlines() if "│" in line)
    return {row[0].strip(): row[1].strip() for row in rows}


def test_what_eval_prints_is_what_it_measured(files, tmp_path, capfd):
    options = ["--reference", files["model"], "--text", files["text"], "--windows", 2, "--window", 32, "--no-speed"]
    run_ok("eval", files["gguf"], *options, "--out", tmp_path / "r.json")
    said, report = table_of(capfd.readouterr().out), json.loads((tmp_path / "r.json").read_text())
    assert said["KL divergence, mean (nats)"] == f"{report['kl_mean']:.4f} ± {report['kl_se']:.4f}"
    assert said["KL median / p90 / p99"] == " / ".join(f"{report[f'kl_{q}']:.4f}" for q in ("median", "p90", "p99"))
    assert said["perplexity"] == f"{report['ppl']:.3f} ± {report['ppl_se']:.3f}"
    assert said["perplexity of the reference"] == f"{report['ppl_reference']:.3f} ± {report['ppl_reference_se']:.3f}"
    assert report["ppl"] != report["ppl_reference"]
    assert said["top-1 agreement"].startswith(f"{report['top1']:.4f}")
    size = files["gguf"].stat().st_size
    assert said["size"] == f"{size / 1e6:.1f} MB, {report['bits_per_weight']:.3f} bits per weight"


def test_what_rotate_prints_is_what_it_measured(files, tmp_path, capfd):
    run_ok("rotate", files["model"], "--out", tmp_path / "r.safetensors", "--rotation", "hadamard", "--calibration",
           files["text"], "--nsamples", 8, "--seqlen", 32)
    said = capfd.readouterr().out
    measured = json.loads((tmp_path / "r.json").read_text())["layers"]
    for matrix in ("q_proj", "down_proj"):
        before, after = (median(row[when]["mu_w"] for row in measured if row["matrix"] == matrix)
                         for when in ("before", "after"))
        assert before != after
        assert any(matrix in line and f"{before:.3g} → {after:.3g}" in line for line in said.splitlines()), said


def test_quiet_json_in_a_process(files):
    done = child("inspect", files["gguf"], "--json", "--quiet")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["architecture"] == "llama"


# what is written

def test_the_built_in_text_is_not_the_one_calibrated_on(files, tmp_path, capfd):
    """`eval`, `reference` and `compare` read its other part."""
    common = ["--text", "builtin", "--windows", 2, "--window", 32]
    run_ok("eval", files["gguf"], "--reference", files["model"], "--no-speed", "--json", *common)
    assert json.loads(capfd.readouterr().out)["text_sha256"] == text_sha256(builtin_text("test"))
    run_ok("reference", files["model"], "--out", tmp_path / "r.json", "-q", *common)
    assert read_reference(tmp_path / "r.json").text_sha256 == text_sha256(builtin_text("test"))
    run_ok("compare", files["model"], "--out", tmp_path / "c", "--rotations", "none", "--quantizers", "rtn",
           "--group-size", 32, "--no-mu-h", "--nsamples", 4, "--seqlen", 32, "--calibration", files["text"], "--json",
           *common)
    settings = json.loads((tmp_path / "c" / "results.json").read_text())["settings"]
    assert settings["recipe"]["text"] == text_sha256(builtin_text("test"))


@pytest.mark.parametrize(("flag", "kind"), [("--no-symmetric", "int4-g32-zero-f16"),
                                            ("--symmetric", "int4-g32-sym-f16")])
def test_symmetric_is_a_flag(flag, kind, files, tmp_path, capfd):
    run_ok("quantize", files["model"], "--format", "gptq", flag, "--group-size", 32, "--out", tmp_path / "c", *RTN,
           "--dry-run", "--json")
    assert json.loads(capfd.readouterr().out)["types"]["body"] == kind


def test_reference_file_then_eval_without_the_model(files, tmp_path, capfd):
    ref, report = tmp_path / "ref.json.gz", tmp_path / "report.json"
    options = ["--windows", 2, "--window", 32]
    run_ok("reference", files["model"], "--text", files["text"], "--out", ref, "-q", *options)
    run_ok("eval", files["gguf"], "--reference", ref, "--out", report, "-q")
    run_ok("eval", files["gguf"], "--reference", files["model"], "--text", files["text"], "--json", *options)
    bound, exact = json.loads(report.read_text()), json.loads(capfd.readouterr().out)
    assert bound["kl_is_lower_bound"] and not exact["kl_is_lower_bound"]
    assert 0 < bound["kl_mean"] <= exact["kl_mean"] + 1e-6 and exact["kl_mean"] <= bound["kl_upper_bound"] + 1e-6
    assert bound["ppl"] == pytest.approx(exact["ppl"], rel=1e-6)
    assert left(tmp_path) == ["ref.json.gz", "report.json"]
    refused(capfd, "reference", files["model"], "--text", files["text"], "--out", ref, says="exists")


def test_llama_perplexitys_reference_file(files, tmp_path, capfd):
    ref, asked = tmp_path / "ref.kld", ["reference", files["model"], "--text", files["text"], "--windows", 2]
    refused(capfd, *asked, "--out", ref, "--top-k", 8, says="leave --top-k out")
    run_ok(*asked, "--window", 32, "--out", ref, "--json", "--quiet")
    assert json.loads(capfd.readouterr().out)["window"] == 32
    run_ok("eval", files["gguf"], "--reference", ref)
    run_ok("eval", files["checkpoint"], "--reference", ref, "--quiet")
    assert "positions scored │ 16 to 30 of every window" in " ".join(capfd.readouterr().out.split())
    assert left(tmp_path) == ["ref.kld"]


def test_eval_within_a_tiny_context(files, tmp_path, capfd):
    """The timing of llama.cpp, too, stays within a context of 8 tokens."""
    model = save_model(tmp_path / "model", "mistral_window")
    run_ok("export", model, "--out", tmp_path / "m.gguf", "-q", *RTN)
    run_ok("eval", tmp_path / "m.gguf", "--reference", model, "--text", files["text"], "--window", 8, "--json")
    report = json.loads(capfd.readouterr().out)
    assert report["tokens"] == 32 * 7 and report["decode_tokens_per_s"] > 0


def test_export_may_keep_the_checkpoint(files, tmp_path):
    run_ok("export", files["model"], "--out", tmp_path / "m.gguf", "--checkpoint", tmp_path / "c", "-q", *RTN)
    assert left(tmp_path) == ["c", "m.gguf"]
    run_ok("export", tmp_path / "c", "--out", tmp_path / "again.gguf", "-q")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()


# inspect

def test_inspect_gguf_without_torch(files):
    code = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "tokenizers", "llama_cpp"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
from optrot_edge.cli import main
main(sys.argv[1:])
"""
    def inspect(path, *options):
        return subprocess.run([sys.executable, "-c", code, "inspect", str(path), *options], capture_output=True,
                              text=True, check=False)

    about, reader = json.loads(inspect(files["gguf"], "--json").stdout), gguf.GGUFReader(files["gguf"])
    assert (about["architecture"], about["file_type"], about["layers"]) == ("llama", "MOSTLY_Q4_0", 2)
    assert about["context_length"] == 256 and about["tied_head"] is False and about["hidden_size"] == 96
    assert about["bytes"] == files["gguf"].stat().st_size
    stored = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert about["bytes_tensors"] == stored and about["bits_per_weight"] == 8 * stored / weights
    for kind in ("Q4_0", "Q8_0", "F32"):
        chosen = [tensor for tensor in reader.tensors if tensor.tensor_type.name == kind]
        assert about["types"][kind.lower()] == {"tensors": len(chosen), "weights": sum(t.n_elements for t in chosen)}
    assert about["types"].keys() == {"q4_0", "q8_0", "f32"}
    assert "MOSTLY_Q4_0" in inspect(files["gguf"]).stdout
    assert inspect(files["checkpoint"]).returncode == 0
    for path in (files["model"], files["rotation"]):
        done = inspect(path)
        assert done.returncode == 2 and 'pip install "optrot-edge[learn]"' in done.stderr


def test_inspect_tied_gguf(files, tmp_path, capfd):
    run_ok("export", files["model"], "--out", tmp_path / "m.gguf", "-q", *RTN)
    run_ok("inspect", tmp_path / "m.gguf", "--json")
    assert json.loads(capfd.readouterr().out)["tied_head"] is True


def test_inspect_what_auto_made(files, tmp_path, capfd):
    """The summary of the package, the checkpoint's, and the tables name the choice and the reason."""
    checkpoint = tmp_path / "c"
    run_ok("export", files["model"], "--out", tmp_path / "m.gguf", "--checkpoint", checkpoint, "--json",
           "--calibration", files["text"], "--plus-steps", 3, *FAST_OPTIONS)
    summary = json.loads(capfd.readouterr().out)
    run_ok("inspect", checkpoint, "--json")
    about, auto = json.loads(capfd.readouterr().out), QuantizedCheckpoint(checkpoint).manifest["auto"]
    assert (about["auto"], about["why"]) == (summary["auto"], summary["why"]) == (auto["chosen"], auto["why"])
    assert "R1 unties the head" in about["why"]
    assert about["rotation"] == {"none": "none"}.get(auto["chosen"], "optrot+")
    run_ok("inspect", checkpoint)
    shown = " ".join(capfd.readouterr().out.replace("│", " ").split())  # a cell's lines joined again
    assert "auto" in shown and about["why"] in shown
    run_ok("export", checkpoint, "--out", tmp_path / "again.gguf")
    assert "why" in capfd.readouterr().out
    run_ok("inspect", files["checkpoint"], "--json")
    assert not {"auto", "why"} & json.loads(capfd.readouterr().out).keys()


def test_inspect_a_rotation_with_scales(files, tmp_path, capfd):
    """Scales by name, without the curve of the learning."""
    options = ["--rotation", "optrot+", "--plus-steps", 2, "--nsamples", 8, "--seqlen", 32]
    run_ok("rotate", files["model"], "--out", tmp_path / "r.safetensors", "--json", "--calibration", files["text"],
           "--rotate", "r2", *options)
    made = json.loads(capfd.readouterr().out)
    run_ok("inspect", tmp_path / "r.safetensors", "--json")
    about = json.loads(capfd.readouterr().out)
    for found in (made, about):
        assert found["scales"] == ["attn_norm", "mlp_norm", "up", "value"] and found["applied"] == ["r2"]
        assert found["loss"] < found["loss_start"] and found["grid"] == "q4_0"
        assert not {"loss_curve", "layer_loss", "layer_loss_start"} & found.keys()
    run_ok("inspect", tmp_path / "r.safetensors")
    assert "attn_norm, mlp_norm, up, value" in " ".join(capfd.readouterr().out.split())
    run_ok("inspect", files["rotation"], "--json")
    about = json.loads(capfd.readouterr().out)
    assert about["scales"] == [] and "loss_curve" not in about


def test_inspect_refusals(files, tmp_path, capfd):
    refused(capfd, "inspect", tmp_path / "nowhere", says="nowhere not found")
    (tmp_path / "a.txt").write_text("hello, this is no model at all")
    refused(capfd, "inspect", tmp_path / "a.txt", says="a.txt is not a GGUF file")
    refused(capfd, "inspect", tmp_path, says="config.json is missing")
    refused(capfd, "inspect", files["model"] / "model.safetensors", says="not a saved rotation")
    checkpoint = shutil.copytree(files["checkpoint"], tmp_path / "c")
    (checkpoint / "optrot.json").write_text('{"format_version": 1}')
    refused(capfd, "inspect", checkpoint, says="damaged or incomplete")
