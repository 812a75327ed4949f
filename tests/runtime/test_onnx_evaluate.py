"""Whole evaluations of ONNX packages, in Python and on the command line."""

import json
import shutil

import pytest

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.runtime.backends import kind_of, open_package, open_reference, size_on_disk
from optrot_edge.runtime.evaluate import evaluate_package, write_reference_file
from optrot_edge.runtime.onnx import OnnxBackend
from tests.cli_runner import refused, run_ok
from tests.onnx_models import as_exported
from tests.runtime.byte_llama import TEXT
from tests.runtime.hf_backends import report_by_hand
from tests.runtime.test_evaluate import KEYS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")
SHORT = {"text": TEXT, "windows": 2, "window": 48}


def test_report_against_the_float_model(genai):
    report = report_by_hand(OnnxBackend, *genai("llama3_rope", "int4"))
    assert report.keys() == KEYS | {"accuracy_level"} and report["accuracy_level"] == 4
    assert report["runtime"].startswith("onnxruntime (1.") and 4.5 < report["bits_per_weight"] < 16


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
def test_unquantised_packages(genai, case):
    source, folder = genai(case)
    assert (kind_of(source), kind_of(folder)) == ("hf", "onnx")
    report = evaluate_package(folder, reference=source, speed=False, **SHORT)
    assert "accuracy_level" not in report and 32 <= report["bits_per_weight"] < 33.5
    assert report["kl_max"] < 1e-6 and report["top1"] > 0.98
    with open_reference(folder) as reference:
        assert reference.runtime == "onnxruntime"


def test_pipeline_and_accuracy_levels(genai, tmp_path, text):
    """The exporter's layout through `pipeline.evaluate`, against a reference file that the float model wrote."""
    source, folder = genai("smollm2", "int4")
    package, file = as_exported(folder, tmp_path / "package"), tmp_path / "ref.json"
    write_reference_file(source, file, **SHORT)
    reports = {level: pipeline.evaluate(package, file, accuracy_level=level, speed=False) for level in (None, 4, 0)}
    assert [report["accuracy_level"] for report in reports.values()] == [4, 4, 0]
    assert reports[None]["kl_mean"] == reports[4]["kl_mean"] != reports[0]["kl_mean"]
    full = pipeline.evaluate(package, source, text=text, windows=2, window=48, speed=False)
    assert full["kl_mean"] > 0.01 and not full["kl_is_lower_bound"]
    assert pipeline.chat(package, "Hello", max_tokens=8) == pipeline.chat(folder, "Hello", max_tokens=8) != ""
    write_reference_file(package, file, **SHORT)  # an ONNX package can be the reference
    assert pipeline.evaluate(package, file, speed=False)["kl_estimate"] == pytest.approx(0, abs=1e-6)


def test_another_models_reference_is_refused(genai):
    package = genai("llama", "int4")[1]
    with pytest.raises(InputError, match="tokenizers of onnx and float disagree"):
        evaluate_package(package, reference=genai("qwen3")[0], **SHORT)
    with pytest.raises(InputError, match="longer than the context"):
        evaluate_package(package, reference=genai("llama")[0], **SHORT | {"window": 257, "windows": 1})


def test_options_of_other_backends_are_refused(genai, tiny):
    source, folder = genai("llama", "int4")
    for options, says in (({"kv_bits": 8}, "--kv-bits is for MLX"), ({"trust_remote_code": True}, "is for MLX")):
        with pytest.raises(InputError, match=says):
            evaluate_package(folder, reference=source, **SHORT | options)
    for backend in (None, "torch"):
        with pytest.raises(InputError, match="--accuracy-level is for ONNX packages"):
            evaluate_package(tiny, reference=tiny, text=TEXT, backend=backend, accuracy_level=4)
    for backend in ("torch", "mlx", "llama.cpp"):
        with pytest.raises(InputError, match=f"an ONNX package runs in onnxruntime only, not in {backend}"):
            open_package(folder, backend)
    with pytest.raises(InputError, match="not in onnxruntime"):
        open_package(tiny, "onnxruntime")
    with pytest.raises(InputError, match="give the package's folder"):
        kind_of(folder / "model.onnx")


def test_a_models_folder_that_ships_graphs_stays_a_model(genai, copied):
    """As on the hub: float weights, and onnx/ beside them."""
    source, folder = genai("llama")
    both = copied(source)
    (both / "onnx").mkdir()
    shutil.copy(folder / "model.onnx", both / "onnx")
    shutil.copy(folder / "genai_config.json", both)
    assert kind_of(both) == "hf"


def test_command_line(genai, tmp_path, text, capfd):
    source, folder = genai("llama", "int4")
    package = as_exported(folder, tmp_path / "package", warnings=["layer 1 is hard"], r4_block=32)
    asked = ["eval", package, "--reference", source, "--text", text, "--windows", "2", "--window", "32"]
    run_ok(*asked, "--backend", "onnxruntime", "--accuracy-level", "0", "--json", "--quiet")
    assert json.loads(capfd.readouterr().out)["accuracy_level"] == 0
    run_ok(*asked, "--no-speed")
    assert "accuracy level 4" in " ".join(capfd.readouterr().out.split())
    refused(capfd, *asked, "--accuracy-level", "7", says="accuracy level 7")
    refused(capfd, *asked, "--device", "mps", says="unknown device 'mps'")
    run_ok("inspect", package, "--json")
    about = json.loads(capfd.readouterr().out)
    assert (about["kind"], about["graph"], about["rotation"]) == ("ONNX package", "onnx/model_q4.onnx", "hadamard")
    assert (about["accuracy_level"], about["r4_block"], about["layers"]) == (4, 32, 2)
    assert about["types"]["4-bit g32"]["tensors"] == 11 and about["bytes"] == size_on_disk(package)
    run_ok("inspect", package)
    assert "warning: layer 1 is hard" in capfd.readouterr().out
    run_ok("chat", package, "Hello", "--max-tokens", "6", "--quiet")
    assert capfd.readouterr().out.strip()
    run_ok("doctor", "--json")
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)["rows"]}
    assert "CPUExecutionProvider" in rows["onnxruntime's providers"]["detail"]
    assert rows["onnxruntime-genai"]["usable"] and rows["onnxruntime-genai"]["kind"] == "runtime"
