"""References for the web page, and damage to its packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from optrot_edge.runtime.reference import Reference, make_reference
from tests.tiny_models import reference_model


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
    ids = tokenizer.encode(text, add_special_tokens=False).ids
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
