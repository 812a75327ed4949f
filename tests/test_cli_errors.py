"""Every way to use the command line wrongly: the exit code, one line that names the thing, nothing left."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli_runner import RTN, child, left, refused, run, run_ok
from tests.road import FAST_OPTIONS, save_model, write_text
from tests.tiny_models import save_tiny, save_tiny_tokenizer


def test_debug_shows_the_traceback(tmp_path, capfd):
    assert run("--debug", "inspect", tmp_path / "nowhere") == 2
    err = capfd.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: ")


def test_internal_failures_are_one_line_and_1(files, tmp_path, monkeypatch, capfd):
    def fail(*arguments, **options):
        raise RuntimeError("two\nlines [bold]")

    monkeypatch.setattr("optrot_edge.pipeline.export", fail)
    arguments = ["export", files["model"], "--out", tmp_path / "m.gguf"]
    refused(capfd, *arguments, code=1, says="internal failure: RuntimeError: two lines [bold] (--debug shows where)")
    assert run("--debug", *arguments) == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(("arguments", "says"), [
    (["nope"], "No such command"), (["export"], "Missing argument"), (["inspect", "a", "--nope"], "No such option"),
    (["rotate", "a", "--out", "b", "--seed", "x"], "--seed"), (["export", "a"], "Missing option '--out'")])
def test_usage_errors(arguments, says, capfd):
    assert "(see --help)" in refused(capfd, *arguments, says=says)


@pytest.mark.parametrize(("options", "says"), [
    (["--type", "q4_k_x"], "q4_k_x"), (["--head-type", "q9"], "q9"), (["--embedding-type", "int4-g128-sym"], "g128"),
    (["--type", "int4-g7-sym"], "groups of 7"), (["--rotation", "magic"], "--rotation magic"),
    (["--rotate", "r1,r9"], "r9"), (["--rotation", "optrot", "--rotate", "r3"], "names neither"),
    (["--rotate", "r1,r4", "--r4-block", 48], "R4 block 48"),
    (["--quantizer", "awq"], "--quantizer awq"), (["--device", "tpu"], "--device tpu"), (["--damp", 2], "--damp"),
    (["--asymmetric", "all"], "--asymmetric all"), (["--asymmetric", "inputs", "--quantizer", "rtn"], "for GPTQ"),
    (["--optrot-solver", "adam"], "adam"), (["--optrot-steps", 0], "step"), (["--nsamples", 0], "--nsamples"),
    (["--nsamples", 100000], "windows"), (["--seqlen", 257], "--seqlen 257"), (["--calibration", "none"], "GPTQ needs"),
    (["--calibration", "missing.txt"], "missing.txt"), (["--seed", -1], "--seed -1: 0 or more")])
def test_recipe_errors(options, says, files, tmp_path, capfd):
    start = ["quantize", files["model"], "--out", tmp_path / "c", *FAST_OPTIONS]
    if "--calibration" not in options:
        start += ["--calibration", files["text"]]
    refused(capfd, *start, *options, says=says)
    assert left(tmp_path) == []


@pytest.mark.parametrize("format", ["gguf", "mlx"])
@pytest.mark.parametrize("out", [".", ".."])
def test_outputs_without_a_name(out, format, files, tmp_path, monkeypatch, capfd):
    """A folder that is there is refused, whatever it is called."""
    here = tmp_path / "a"
    here.mkdir()
    (here / "b").mkdir()
    monkeypatch.chdir(here)
    refused(capfd, "export", files["model"], "--format", format, "--out", out, *RTN, says="exist")
    refused(capfd, "export", files["model"], "--format", format, "--out", "/", *RTN, says="give a name in it")
    assert left(tmp_path) == ["a"] and left(here) == ["b"]


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize(("case", "config", "options", "says"), [
    ("smollm2", {}, ["--split-max-size", "40KB"], "--split-max-size: embed_tokens.weight alone takes 52,224 bytes"),
    ("qwen2", {"rope_parameters": LLAMA3}, [], "factors for llama only, not for qwen2"),
    ("smollm2", {}, ["--format", "gptq", "--type", "f16"], "needs quantised matrices"),
    ("llama", {"vocab_size": 513}, ["--format", "gptq", "--group-size", 32, "--head-type", "4bit"],
     "513 by 96, and GPTQ's format needs multiples of 8")])
def test_what_the_exporter_would_refuse_is_refused_before_any_work(case, config, options, says, tmp_path, capfd):
    model, layers = save_model(tmp_path / "model", case, vocab_size=config.get("vocab_size", 512)), []
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    arguments = ["export", model, "--out", tmp_path / "p", *RTN, *options]
    refused(capfd, *arguments, says=says)
    refused(capfd, *arguments, "--dry-run", says=says)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optrot_edge.pipeline._quantize_into", lambda *_: layers.append(1))
        refused(capfd, *arguments, says=says)
    assert not layers and left(tmp_path) == ["model"]


@pytest.mark.parametrize("format", ["mlx", "onnx", "gptq"])
def test_a_model_without_a_tokenizer_is_named(format, tmp_path, capfd):
    """Not the copy in which its absence is found."""
    model = save_tiny(tmp_path / "model", "llama")
    line = refused(capfd, "export", model, "--format", format, "--out", tmp_path / "package",
                   "--rotation", "none", "--group-size", 32, says="no tokenizer.json")
    assert line.startswith(f"error: {model}: ") and line.endswith(f"put tokenizer.json into {model}")
    assert left(tmp_path) == ["model"]


def test_places_that_are_one(files, tmp_path, capfd):
    out = tmp_path / "m.gguf"
    for option in ("--save-imatrix", "--checkpoint"):
        refused(capfd, "export", files["model"], "--out", out, option, tmp_path / "." / "m.gguf", *RTN,
                says=f"--out and {option} are both {out}")
    refused(capfd, "quantize", files["model"], "--out", tmp_path / "c", "--save-imatrix", tmp_path / "c", *RTN,
            says="--out and --save-imatrix are both")
    assert left(tmp_path) == []


def test_what_is_no_package_is_not_overwritten(files, tmp_path, copied, capfd):
    notes, model = tmp_path / "notes.txt", copied(files["model"])
    notes.write_text("keep")
    for out in (notes, model / "model.safetensors"):
        held = out.read_bytes()
        refused(capfd, "export", model, "--out", out, "--overwrite", *RTN, says="is no GGUF file, and --overwrite")
        assert out.read_bytes() == held
    gguf, report = Path(shutil.copy(files["gguf"], tmp_path)), tmp_path / "report.json"
    options = ["--reference", files["model"], "--text", files["text"], "--windows", 1, "--window", 32, "--no-speed"]
    for out in (gguf, notes):
        held = out.read_bytes()
        refused(capfd, "eval", gguf, *options, "--out", out, says="is no report of an evaluation")
        assert out.read_bytes() == held
    for _ in range(2):  # a report may be replaced
        run_ok("eval", gguf, *options, "--out", report, "-q")
    refused(capfd, "reference", files["model"], "--text", files["text"], "--out", tmp_path / "ref.txt",
            says="ends in .json, .json.gz or .kld")


def test_somebody_elses_lock_file(files, tmp_path, capfd):
    (tmp_path / "poetry.lock").write_text("# This file is automatically @generated by Poetry\n")
    refused(capfd, "export", files["model"], "--out", tmp_path / "poetry", *RTN, says="no lock of optrot-edge; move it")
    assert (tmp_path / "poetry.lock").read_text().endswith("by Poetry\n") and left(tmp_path) == ["poetry.lock"]


def test_links_are_followed(files, tmp_path, capfd):
    link, options = tmp_path / "link", ["--format", "mlx", "--group-size", 32, *RTN, "-q"]
    (tmp_path / "there").mkdir()
    link.symlink_to("there")
    for seed in (0, 1, 2):
        run_ok("export", files["model"], "--out", link, *options, "--overwrite", "--seed", seed)
    assert link.is_symlink() and (tmp_path / "there" / "config.json").is_file()
    assert left(tmp_path) == ["link", "there"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    refused(capfd, "export", files["model"], "--out", loop, *options, says=f"--out {loop}")


def test_unknown_format(files, tmp_path, capfd):
    refused(capfd, "export", files["model"], "--out", tmp_path / "m", "--format", "pdf", says="--format pdf: use gguf")


@pytest.mark.parametrize(("text", "says"), [("", "is empty"), (" \n", "is empty"), ("short", "enough for 0 windows"),
                                            (b"\xff\xfe\xfa", "UTF-8")])
def test_unusable_texts(text, says, files, tmp_path, capfd):
    path = tmp_path / "t.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capfd, "quantize", files["model"], "--out", tmp_path / "c", *FAST_OPTIONS, "--calibration", path,
                   says=says)
    assert "t.txt" in line or "--nsamples" in line
    if text != "short":
        refused(capfd, "reference", files["model"], "--out", tmp_path / "r.json", "--text", path, says=says)
    assert left(tmp_path) == ["t.txt"]


def test_windows_beyond_the_context(files, tmp_path, capfd):
    text = ["--text", files["text"], "--windows", 1, "--window", 300]
    refused(capfd, "eval", files["gguf"], "--reference", files["model"], *text, says="longer than the context of 256")
    refused(capfd, "reference", files["model"], "--out", tmp_path / "r.json", *text, says="context of 256")
    refused(capfd, "eval", files["gguf"], "--reference", files["model"], says="--text")
    assert left(tmp_path) == []


# damaged models: the same for both commands that read one

def damage_missing(folder: Path) -> str:
    shutil.rmtree(folder)
    return "no such file or folder"


def damage_no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json is missing"


def damage_truncated(folder: Path) -> str:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:len(content) // 2])
    return "model.safetensors is truncated or damaged"


def damage_nan(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "layers.1.up_proj.weight holds NaN"


def damage_dtype(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.norm.weight has dtype I32"


def change_config(folder: Path, **changes) -> None:
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))


def damage_contradiction(folder: Path) -> str:
    change_config(folder, intermediate_size=192)
    return "the configuration calls for"


def damage_layers(folder: Path) -> str:
    change_config(folder, num_hidden_layers=3)
    return "layers.2."


def damage_family(folder: Path) -> str:
    change_config(folder, model_type="gemma3", architectures=["Gemma3ForCausalLM"])
    return "'gemma3' cannot be rotated"


def damage_experts(folder: Path) -> str:
    change_config(folder, model_type="mixtral", architectures=["MixtralForCausalLM"])
    return "mixture of experts"


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders(damage, files, tmp_path, capfd):
    folder = shutil.copytree(files["model"], tmp_path / "model")
    says = damage(folder)
    before = left(tmp_path)
    for command, out in (("export", "m.gguf"), ("quantize", "c"), ("rotate", "r.safetensors")):
        options = FAST_OPTIONS[:4] if command == "rotate" else [*FAST_OPTIONS, "--calibration", files["text"]]
        refused(capfd, command, folder, "--out", tmp_path / out, *options, says=says)
        assert left(tmp_path) == before


def test_missing_shard(tmp_path, capfd):
    folder = save_tiny(tmp_path / "model", "llama", shards=True, tokenizer="smollm")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(capfd, "export", folder, "--out", tmp_path / "m.gguf", says=f"shard {shard.name} of the index is missing")
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_truncated_gguf(share, files, tmp_path, capfd):
    content = files["gguf"].read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[:int(share * len(content))])
    for command in (["export", cut, "--out", tmp_path / "m.gguf"], ["inspect", cut],
                    ["eval", cut, "--reference", files["model"], "--text", files["text"]]):
        refused(capfd, *command, says="cut.gguf is truncated or damaged")
    assert left(tmp_path) == ["cut.gguf"]


def test_rows_that_no_type_divides(tmp_path, capfd):
    """144 is no multiple of 32: every GGUF block type is refused before any work, floats are not."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=144, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32, vocab_size=512, max_position_embeddings=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    start = ["export", tmp_path / "model", "--out", tmp_path / "m.gguf"]
    for extra in ([], ["--dry-run"]):
        refused(capfd, *start, *extra, "--seqlen", 32, says="rows of 144 weights do not divide into")
    assert left(tmp_path) == ["model"]
    run_ok(*start, "--type", "f16", "--head-type", "f16", "-q", *RTN)


# outputs

def test_unwritable_outputs(files, tmp_path, capfd):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "x"
    for command in (["export", files["model"], *RTN], ["export", files["checkpoint"]],
                    ["quantize", files["model"], *RTN],
                    ["rotate", files["model"], "--rotation", "hadamard"],
                    ["reference", files["model"], "--text", files["text"], "--windows", 1, "--window", 16],
                    ["eval", files["gguf"], "--reference", files["model"], "--text", files["text"], "--windows", 1,
                     "--window", 16]):
        line = refused(capfd, *command, "--out", out, says=str(tmp_path / "file"))
        assert "cannot" in line
    assert left(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_existing_outputs(files, tmp_path, capfd):
    out = tmp_path / "taken"
    out.write_text("mine")
    for command in (["export", files["model"], *RTN], ["export", files["checkpoint"]],
                    ["quantize", files["model"], *RTN], ["rotate", files["model"]],
                    ["reference", files["model"], "--text", files["text"]]):
        refused(capfd, *command, "--out", out, says="taken exists; choose another --out or pass --overwrite")
    assert out.read_text() == "mine" and left(tmp_path) == ["taken"]
    refused(capfd, "quantize", files["model"], "--out", out, "--overwrite", *RTN, says="taken is no checkpoint")
    out.write_bytes(b"GGUF of mine")
    run_ok("export", files["checkpoint"], "--out", out, "--overwrite", "-q")
    assert out.read_bytes() == files["gguf"].read_bytes()
    refused(capfd, "export", files["checkpoint"], "--out", tmp_path, "--overwrite", says="is a folder")


def test_a_checkpoint_takes_no_recipe(files, tmp_path, capfd):
    refused(capfd, "export", files["checkpoint"], "--out", tmp_path / "m.gguf", "--type", "q8_0", "--seed", "0",
            says="is already quantised; --seed, --type cannot be changed now")
    assert left(tmp_path) == []


def test_export_of_a_damaged_checkpoint(files, tmp_path, capfd):
    checkpoint = shutil.copytree(files["checkpoint"], tmp_path / "c")
    (checkpoint / "layer-00001.safetensors").unlink()
    refused(capfd, "export", checkpoint, "--out", tmp_path / "m.gguf", says="layer-00001.safetensors is missing")
    assert left(tmp_path) == ["c"]


def limit_files() -> None:
    """In the child: no file may grow beyond 60 kB, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.parametrize("command", ["quantize", "export", "package", "rotate", "reference"])
def test_full_disk(command, files, tmp_path):
    arguments = {"quantize": ["quantize", files["model"], *RTN], "export": ["export", files["model"], *RTN],
                 "package": ["export", files["checkpoint"]],
                 "rotate": ["rotate", files["model"], "--rotation", "hadamard", "--calibration", "none"],
                 "reference": ["reference", files["model"], "--text", files["text"], "--window", 64]}[command]
    out = tmp_path / ("out.json" if command == "reference" else "out")
    done = child(*arguments, "--out", out, preexec_fn=limit_files)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and "out" in line and "cannot" in line, done.stderr
    kept = {"quantize": ["out.partial"], "export": ["out.checkpoint.partial"]}.get(command, [])  # what had room
    assert left(tmp_path) == kept and ("the same command continues" in line) == bool(kept)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "sent"), [("quantize", signal.SIGINT), ("export", signal.SIGTERM),
                                               ("rotate", signal.SIGINT)])
def test_interrupt(command, sent, tmp_path):
    """Ctrl-C or SIGTERM once the work is under way (a temporary folder or the progress line shows it)."""
    model = save_model(tmp_path / "model", "tinyllama")
    out = tmp_path / "place"
    out.mkdir()
    options = ["--optrot-steps", "200000", "--optrot-rows", "64"]
    if command != "rotate":
        options += ["--nsamples", "4", "--seqlen", "32", "--calibration", str(write_text(tmp_path / "t.txt"))]
    process = subprocess.Popen([sys.executable, "-m", "optrot_edge", command, str(model), "--out", str(out / "x"),
                                *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "FORCE_COLOR": "1", "TTY_INTERACTIVE": "1"})
    try:
        seen = wait_for_work(process, out, command)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "interrupted" in seen + err and "Traceback" not in err
    if "is kept in" in err:  # with auto an arm may be finished by then
        assert "the same command continues" in err and left(out)[0].endswith(".partial")
    else:
        assert left(out) == []


@pytest.mark.slow
@pytest.mark.parametrize(("command", "sent"), [("quantize", signal.SIGTERM), ("export", signal.SIGINT)])
def test_an_interrupt_with_layers_finished(command, sent, tmp_path):
    """They are kept, the message says so, and the same command continues."""
    model, out = save_model(tmp_path / "model", "tinyllama"), tmp_path / "place"
    out.mkdir()
    arguments = [command, model, "--out", out / "x", "--nsamples", "64", "--seqlen", "200", "--rotation", "none",
                 "--calibration", write_text(tmp_path / "t.txt", 40)]
    process = subprocess.Popen([sys.executable, "-m", "optrot_edge", *map(str, arguments)], stderr=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not list(out.glob("*.partial/layer-00000.safetensors")):
            time.sleep(0.01)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    [work] = left(out)
    assert f"interrupted; what is finished is kept in {out / work}, and the same command continues" in err
    done = child(*arguments, "--json")
    assert done.returncode == 0 and left(out) == ["x"], done.stderr
    refused = child(*arguments)
    assert refused.returncode == 2 and "exists" in refused.stderr


def test_interrupt_while_python_runs_a_string(tmp_path):
    """As `dataclass` does when a module is imported late: under -m, Python would kill itself with SIGINT after that."""
    (tmp_path / "late.py").write_text("from optrot_edge import cli\n\n@cli.app.command()\ndef late():\n"
                                      "    exec('raise KeyboardInterrupt')\n\ncli.main(['late'])\n")
    done = subprocess.run([sys.executable, "-m", "late"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and "interrupted" in done.stderr, done.stderr


def wait_for_work(process, out: Path, command: str) -> str:
    """Wait until a temporary folder is there or, for `rotate`, the first progress; what was printed."""
    end = time.monotonic() + 120
    seen = ""
    while time.monotonic() < end and process.poll() is None:
        if command == "rotate":
            seen += process.stderr.read(1)
            if "learn" in seen:
                return seen
        elif any(name.endswith(".partial") for name in left(out)):
            time.sleep(0.5)
            return seen
        else:
            time.sleep(0.02)
    raise AssertionError(f"no work seen: {process.poll()} {seen}")
