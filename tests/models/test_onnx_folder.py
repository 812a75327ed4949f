"""What an ONNX package is read as, without running it."""

import json

import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.models.onnx_folder import OnnxFolder, OnnxTensor, is_onnx
from tests.onnx_models import as_exported, edit_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime_genai")
_NORMS = 5 * 96  # float32 gains of two layers, and the last
_TABLES = 2 * 256 * 16  # of RoPE


def test_types_and_sizes(genai):
    """A tied head, which is stored once: everything by hand."""
    folder = OnnxFolder(genai("smollm2", "int4")[1])
    heads = 2 * (160 * 96 + 96 * 96 + 3 * 160 * 96)  # qkv, o, and the three of the MLP
    weights = heads + 512 * 96
    tensors = folder.tensors
    assert tensors["lm_head.MatMul.weight_Q4"] == OnnxTensor("4-bit g32", 512 * 96, 5 * 512 * 96)
    assert tensors["cos_cache"] == OnnxTensor("tables", 0, 32 * _TABLES // 2)
    quantised = [tensor for tensor in tensors.values() if tensor.kind == "4-bit g32"]
    assert len(quantised) == 11 and sum(tensor.weights for tensor in quantised) == weights
    assert {tensor.kind for tensor in tensors.values()} == {"4-bit g32", "float32", "tables"}
    stored = 5 * weights + 32 * (_NORMS + _TABLES)  # 4 bits and a float32 scale per 32
    assert folder.bits_per_weight == stored / (weights + _NORMS)
    data = sum(file.stat().st_size for file in folder.data)
    assert 0 <= data - stored // 8 < 4096 * 30  # alignment of each tensor
    assert (folder.opset, folder.accuracy_level, folder.context_length) == (22, 4, 256)
    assert folder.optrot == {} == folder.config and folder.missing_window is None


def test_a_quantised_embedding_of_its_own(genai, copied):
    """It is reshaped before it is looked up."""
    def untie(model):
        head = next(node for node in model.graph.node if node.name.startswith("/lm_head/MatMul"))
        model.graph.node.remove(head)

    folder = genai("smollm2", "int4")[1]
    untied = OnnxFolder(edit_graph(copied(folder), untie))
    assert untied.tensors == OnnxFolder(folder).tensors


def test_other_types(genai):
    """8 bits, zero-points, QDQ, float16, float32."""
    untied = 512 * 96 + 2 * (160 * 96 + 96 * 96 + 3 * 160 * 96)
    eight = OnnxFolder(genai("llama", "int8")[1])
    assert {"8-bit g32"} < {tensor.kind for tensor in eight.tensors.values()}
    asymmetric = OnnxFolder(genai("llama", "int4", is_symmetric="false")[1])
    head = asymmetric.tensors["lm_head.MatMul.weight_Q4"]
    assert (head.kind, head.weights, head.bits) == ("4-bit g32", 512 * 96, 5 * 512 * 96 + 8 * 512 * 2)  # 3 in 2 bytes
    qdq = OnnxFolder(genai("llama", "int4", use_qdq="true")[1])
    found = [tensor for tensor in qdq.tensors.values() if tensor.kind == "4-bit g32"]
    assert sum(tensor.weights for tensor in found) == untied and qdq.accuracy_level is None
    for precision, kind, bits in (("fp16", "float16", 16), ("fp32", "float32", 32)):
        tensors = OnnxFolder(genai("llama", precision)[1]).tensors
        assert {tensor.kind for tensor in tensors.values()} == {kind, "tables"}
        assert sum(tensor.weights for tensor in tensors.values()) == untied + 512 * 96 + _NORMS
        assert all(tensor.bits == bits * tensor.weights for tensor in tensors.values() if tensor.weights)


def test_hadamard_tables_are_no_weights(genai, tmp_path):
    package = as_exported(genai("llama", "int4")[1], tmp_path / "package", r4_block=32)
    before = OnnxFolder(package)
    edit_graph(package, lambda model: model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones((32, 32), np.float32), "hadamard_32")))
    after = OnnxFolder(package)
    assert after.tensors["hadamard_32"] == OnnxTensor("tables", 0, 32 * 32 * 32)
    assert after.bits_per_weight > before.bits_per_weight
    assert after.optrot["r4_block"] == 32 and after.filename == "onnx/model_q4.onnx"


def test_editing_the_level_changes_nothing_else(genai):
    folder = OnnxFolder(genai("llama", "int4")[1])
    edited = onnx.ModelProto.FromString(folder.at_accuracy_level(0))
    levels = [entry.i for node in edited.graph.node for entry in node.attribute if entry.name == "accuracy_level"]
    assert levels == [0] * 11 and folder.accuracy_level == 4
    for node in edited.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = 4
    assert edited == folder.model
    bare = onnx.ModelProto.FromString(folder.at_accuracy_level(0))
    for node in bare.graph.node:  # a graph that says nothing has level 0
        kept = [entry for entry in node.attribute if entry.name != "accuracy_level"]
        del node.attribute[:]
        node.attribute.extend(kept)
    folder.model = bare
    assert folder.accuracy_level == 0
    folder.model = onnx.ModelProto.FromString(folder.at_accuracy_level(4))
    assert folder.accuracy_level == 4


def test_which_folders_are_packages(genai, tmp_path):
    source, folder = genai("llama", "int4")
    assert is_onnx(folder) and not is_onnx(source) and not is_onnx(tmp_path)
    package = as_exported(folder, tmp_path / "package")
    (package / "genai_config.json").unlink()
    assert is_onnx(package)  # config.json says so
    with pytest.raises(InputError, match="no genai_config.json"):
        OnnxFolder(package)
    (package / "config.json").write_text("{}")
    assert is_onnx(package)  # it has a graph: one for transformers.js, say
    (package / "config.json").write_text(json.dumps({"optrot": {"format": "mlx"}}))
    assert not is_onnx(package)
    (package / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        is_onnx(package)
