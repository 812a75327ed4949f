"""ONNX packages that cannot be run, and what is said of them."""

import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.runtime.onnx import OnnxBackend
from tests.mlx_models import edit_config
from tests.onnx_models import as_exported, edit_genai, edit_graph
from tests.runtime.hf_backends import refuses_what_does_not_fit

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
TOKENS = np.random.default_rng(0).integers(0, 512, 40)


@pytest.fixture
def package(genai, tmp_path):
    return as_exported(genai("llama", "int4")[1], tmp_path / "package")


def refused(folder, **options):
    with pytest.raises(InputError) as caught:
        OnnxBackend(folder, **options)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_a_package_moved_without_its_external_data(package):
    data = package / "onnx" / "model_q4.onnx_data"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    assert "model_q4.onnx_data is truncated" in refused(package)
    data.unlink()
    message = refused(package)
    assert "onnx/model_q4.onnx_data is missing" in message and "without its external data" in message
    data.write_bytes(content)
    with OnnxBackend(package) as backend:
        assert backend.logits([1]).shape == (1, 512)


def test_damaged_graphs(package):
    graph = package / "onnx" / "model_q4.onnx"
    content = graph.read_bytes()
    for spoiled in (b"", content[:-100], b"\xff" * 400):
        graph.write_bytes(spoiled)
        message = refused(package)
        assert "truncated or damaged" in message or "holds no graph" in message
    graph.unlink()
    assert "the graph onnx/model_q4.onnx is missing" in refused(package)


@pytest.mark.parametrize("what", ["opset", "contrib", "ir"])
def test_graphs_newer_than_onnxruntime(package, what):
    def newer(model):
        if what == "ir":
            model.ir_version = 99
        else:
            model.opset_import[("opset", "contrib").index(what)].version = 60

    edit_graph(package, newer)
    message = refused(package)
    assert f"newer than onnxruntime {ort.__version__}" in message
    assert "pip install --upgrade onnxruntime" in message


def test_graphs_that_onnxruntime_refuses(package):
    def three_bits(model):
        for node in model.graph.node:
            for entry in node.attribute:
                if entry.name == "bits":
                    entry.i = 3

    assert "onnxruntime cannot load it" in refused(edit_graph(package, three_bits))


def test_graphs_that_are_no_decoders(package):
    def ask_more(model):
        extra = model.graph.input.add()
        extra.CopyFrom(model.graph.input[0])
        extra.name = "pixel_values"

    assert "its input pixel_values is unknown" in refused(edit_graph(package, ask_more))


@pytest.mark.parametrize(("section", "changes", "says"), [
    ("model", {"decoder": None}, "names no graph"), ("model", {"decoder": {"pipeline": []}}, "names no graph"),
    ("model.decoder", {"filename": 3}, "names no graph"), ("model.decoder", {"num_hidden_layers": 1}, "unknown here"),
    ("model.decoder", {"head_size": 8}, "onnxruntime cannot run it"),
    ("model.decoder", {"head_size": None}, "head_size is None"),
    ("model.decoder", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ("model.decoder", {"inputs": [1]}, "inputs is no object of names"),
    ("model.decoder", {"inputs": {"past_key_names": "past.%d"}}, "unknown here"),
    ("model.decoder", {"outputs": {"present_key_names": "gone.%d"}}, "no output gone.0, which genai_config.json names"),
    ("model.decoder", {"outputs": {"logits": "lodgings"}}, "no output lodgings"),
])
def test_damaged_genai_configs(package, section, changes, says):
    assert says in refused(edit_genai(package, section, **changes))


@pytest.mark.parametrize(("optrot", "says"), [
    ({"format": "onnx", "format_version": 2}, "by a newer optrot-edge (format 2; this one reads up to 1)"),
    ({"format": "onnx", "format_version": "x"}, "format_version 'x'"), ([1], "not an object"),
])
def test_newer_and_damaged_packages(package, optrot, says):
    message = refused(edit_config(package, optrot=optrot))
    assert says in message and ("upgrade" in message or "export the package again" in message)


def test_folders_that_are_no_package(package):
    for content in ("", "{", "[1]"):
        (package / "genai_config.json").write_text(content)
        assert "genai_config.json" in refused(package)
    (package / "genai_config.json").unlink()
    assert "no genai_config.json" in refused(package)
    assert "no genai_config.json" in refused(package / "nothing")


def test_devices(genai):
    folder = genai("llama", "int4")[1]
    available = ort.get_available_providers()
    for device, name in (("cuda", "CUDAExecutionProvider"), ("dml", "DmlExecutionProvider"),
                         ("webgpu", "WebGpuExecutionProvider")):
        if name not in available:
            with pytest.raises(InputError, match=f"has no {device} device .*CPUExecutionProvider.*; use --device cpu"):
                OnnxBackend(folder, device=device)
    for device in ("mps", "auto", "tpu"):
        with pytest.raises(InputError, match=f"unknown device '{device}'; ONNX packages run on cpu, cuda, dml"):
            OnnxBackend(folder, device=device)


def test_accuracy_levels_that_cannot_be_had(genai):
    folder = genai("llama", "int4")[1]
    for level in (-1, 5):
        with pytest.raises(InputError, match=f"accuracy level {level}: 0"):
            OnnxBackend(folder, accuracy_level=level)
    assert "no MatMulNBits" in refused(genai("llama")[1], accuracy_level=4)


def test_what_does_not_fit(genai):
    refuses_what_does_not_fit(OnnxBackend, genai("llama")[1])
