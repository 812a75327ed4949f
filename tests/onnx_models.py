"""Tiny ONNX packages, made by onnxruntime-genai's own model builder."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path


def build(source: Path, out: Path, precision: str = "fp32", provider: str = "cpu", **options) -> Path:
    """`source`, a Hugging Face folder, through the builder with its extra options."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    places = (None, str(source), str(out), precision, provider, str(out) + "-cache")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        extra = parse_extra_options(*places, [f"{name}={value}" for name, value in options.items()])
        create_model(*places, **extra)
    return Path(out)


def edit_genai(folder: Path, section: str = "model", **changes) -> Path:
    """Set keys of a section of the folder's genai_config.json; returns the folder."""
    path = Path(folder) / "genai_config.json"
    config = entry = json.loads(path.read_text())
    for part in section.split("."):
        entry = entry[part]
    entry.update(changes)
    path.write_text(json.dumps(config))
    return Path(folder)


def edit_graph(folder: Path, change) -> Path:
    """Apply `change` to the graph's proto (external data stay where they are); returns the folder."""
    import onnx

    path = Path(folder) / json.loads((Path(folder) / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    return Path(folder)


def as_exported(folder: Path, out: Path, **optrot) -> Path:
    """The builder's folder laid out as the exporter's: the graph in onnx/, named as transformers.js wants it."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("model.onnx*"))
    (out / "onnx").mkdir()
    shutil.copy(folder / "model.onnx", out / "onnx" / "model_q4.onnx")
    shutil.copy(folder / "model.onnx.data", out / "onnx" / "model_q4.onnx_data")
    edit_genai(out, "model.decoder", filename="onnx/model_q4.onnx")

    def rename(model):
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "model_q4.onnx_data"

    edit_graph(out, rename)
    about = {"format": "onnx", "format_version": 1, "rotation": "hadamard"} | optrot
    (out / "config.json").write_text(json.dumps({"model_type": "llama", "optrot": about}))
    return out
