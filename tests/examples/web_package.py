"""ONNX packages in the layout that transformers.js loads, from a Hugging Face folder, and their logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from optrot_edge.runtime.reference import Reference, make_reference
from tests.tiny_models import reference_model


def make_package(source: Path, out: Path, precision: str = "int4", dtype: str = "q4") -> Path:
    """Round to nearest with onnxruntime-genai's builder, blocks of 32, then the layout of transformers.js.

    genai needs the graph under the name in genai_config.json, so that file points to onnx/.
    """
    import onnx
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    built = out.with_name(out.name + "-built")
    paths = (None, str(source), str(built), precision, "cpu", str(built / "cache"))
    create_model(*paths, **parse_extra_options(*paths, ["accuracy_level=1", "block_size=32"]))
    model = onnx.load(built / "model.onnx")
    config = json.loads((source / "config.json").read_text())
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == "kv_cache_dim":
                dim.dim_value = head_dim
    name = f"model_{dtype}.onnx"
    (out / "onnx").mkdir(parents=True)
    onnx.save(model, out / "onnx" / name, save_as_external_data=True, all_tensors_to_one_file=True,
              location=f"{name}_data", size_threshold=1024)
    for path in built.iterdir():
        if path.is_file() and not path.name.startswith("model.onnx"):
            shutil.copy(path, out)
    shutil.copy(source / "generation_config.json", out)
    genai = json.loads((out / "genai_config.json").read_text())
    genai["model"]["decoder"]["filename"] = f"onnx/{name}"
    (out / "genai_config.json").write_text(json.dumps(genai))
    config["transformers.js_config"] = {"use_external_data_format": {name: 1}, "dtype": dtype}
    (out / "config.json").write_text(json.dumps(config))
    shutil.rmtree(built)
    return out


class OnnxLogits:
    """The package's logits in onnxruntime, window by window, as a backend of `make_reference` gives them."""

    runtime, version = "onnxruntime", "test"

    def __init__(self, package: Path):
        import onnxruntime

        path = next((package / "onnx").glob("*.onnx"))
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.name = package.name

    def iter_logits(self, tokens: np.ndarray, *, progress=None):
        for window in tokens:
            feeds = {"input_ids": window[None].astype(np.int64), "attention_mask": np.ones((1, len(window)), np.int64)}
            for entry in self.session.get_inputs():
                if entry.name.startswith("past"):
                    feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            yield self.session.run(["logits"], feeds)[0][0]


class TorchLogits:
    """The original model's logits."""

    runtime, version, name = "torch", "test", "original"

    def __init__(self, source: Path):
        self.model = reference_model(source)
        self.vocab_size = self.model.config.vocab_size

    def iter_logits(self, tokens: np.ndarray, *, progress=None):
        import torch

        for window in tokens:
            with torch.no_grad():
                yield self.model(torch.from_numpy(window[None].astype(np.int64))).logits[0].numpy()


def make_tiny_reference(source: Path, text: str, probe: str, windows: int = 4, length: int = 48) -> Reference:
    """A reference of the folder's own model on the first windows of `text`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:windows * length]
    return make_reference(TorchLogits(source), np.array(ids, np.int32).reshape(windows, length), top_k=16,
                          probe={"text": probe, "ids": encode_plain(tokenizer, probe)})


def encode_plain(tokenizer, text: str) -> list[int]:
    """Ids with special tokens read as plain text, as the project's own tokenizers do."""
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text).ids
    tokenizer.encode_special_tokens = False
    return ids


def scale_weights(package: Path, part: str, factor: float) -> None:
    """Damage: multiply the scales of the linears whose name holds `part`."""
    import onnx
    from onnx import numpy_helper

    path = next((package / "onnx").glob("*.onnx"))
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if part in tensor.name and "scale" in tensor.name:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), tensor.name))
    data = path.with_name(path.name + "_data")
    data.unlink()
    onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data.name,
              size_threshold=1024)
