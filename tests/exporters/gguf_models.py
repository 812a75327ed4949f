"""Tiny quantised checkpoints, and what llama.cpp makes of a GGUF file."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np
import torch

from optrot_edge.checkpoint import CheckpointWriter, QuantizedCheckpoint, QuantizedTensor, grid_spec
from optrot_edge.models import open_model
from optrot_edge.quantize.grids import Grid
from tests.tiny_models import VOCAB_SIZE, save_tiny, save_tiny_tokenizer


def round_to_nearest(weights: np.ndarray, grid: str) -> QuantizedTensor:
    """Codes of `weights` [out, in] with plain min-max scales per block of 32, or fitted ones of two levels."""
    spec = grid_spec(grid)
    if spec.subscales or spec.codebook:
        fitted, weights = Grid(spec), torch.from_numpy(weights).float()
        params = fitted.fit(weights)
        return fitted.pack(fitted.round(weights, params), params)
    blocks = weights.reshape(len(weights), -1, spec.group_size).astype(np.float32)
    if spec.kind == "symmetric":
        half = spec.levels // 2
        scales = (np.abs(blocks).max(-1) / (half - 1)).astype(np.float16)
        offsets, zero = None, half
        steps = blocks / scales.astype(np.float32)[..., None] + zero
    else:
        offsets = blocks.min(-1).astype(np.float16)
        scales = ((blocks.max(-1) - blocks.min(-1)) / (spec.levels - 1)).astype(np.float16)
        steps = (blocks - offsets.astype(np.float32)[..., None]) / scales.astype(np.float32)[..., None]
    codes = np.clip(np.rint(steps), 0, spec.levels - 1).astype(np.uint8)
    return QuantizedTensor(spec, codes.reshape(weights.shape), scales, offsets)


def write_checkpoint(path: Path, case: str, body: str = "q8_0", table: str = "float32", *,
                     tokenizer: str = "smollm", rotation: dict | None = None,
                     changes: dict | None = None, vocab_size: int = VOCAB_SIZE) -> QuantizedCheckpoint:
    """The tiny model of `case` with linears on `body` and embedding and head on `table`.

    Both are a grid's name or a float dtype. `changes` overwrite the model configuration.
    """
    folder = save_tiny(path / "hf", case, vocab_size=vocab_size)
    save_tiny_tokenizer(folder, tokenizer)
    source = open_model(folder)

    def stored(weights: torch.Tensor, kind: str):
        weights = weights.numpy()
        return weights.astype(kind) if kind.startswith("float") else round_to_nearest(weights, kind)

    def shard(tensors: dict, kind: str):
        return {name: stored(tensor, kind if tensor.ndim == 2 else "float32")
                for name, tensor in tensors.items()}

    with CheckpointWriter(path / "checkpoint") as writer:
        outer = {"embed_tokens.weight": source.embedding(torch.float32),
                 "norm.weight": source.final_norm(torch.float32)}
        head = source.lm_head(torch.float32)
        writer.write_shard("outer", shard(outer if head is None else outer | {"lm_head.weight": head}, table))
        for i in range(source.config.num_hidden_layers):
            layer = source.layer(i, torch.float32)
            writer.write_shard(f"layer{i}", shard({f"layers.{i}.{key}": w for key, w in layer.items()}, body))
        writer.finish({"model": source.config.to_dict() | (changes or {}),
                       "rotation": rotation or {"rotation": "none", "applied": []}})
    source.save_tokenizer(path / "checkpoint" / "tokenizer")
    return QuantizedCheckpoint(path / "checkpoint")


class Decoded:
    """A checkpoint's decoded weights, as `optrot_edge.models.forward.logits` wants a model."""

    def __init__(self, checkpoint: QuantizedCheckpoint, config):
        self.checkpoint, self.config = checkpoint, config

    def _tensor(self, name: str, dtype) -> torch.Tensor:
        return torch.from_numpy(self.checkpoint.weights(name)).to(dtype)

    def embedding(self, dtype):
        return self._tensor("embed_tokens.weight", dtype)

    def final_norm(self, dtype):
        return self._tensor("norm.weight", dtype)

    def lm_head(self, dtype):
        return self._tensor("lm_head.weight", dtype) if "lm_head.weight" in self.checkpoint else None

    def layer(self, i: int, dtype):
        prefix = f"layers.{i}."
        return {name.removeprefix(prefix): self._tensor(name, dtype)
                for name in self.checkpoint.names if name.startswith(prefix)}


def load_llama(path: Path, **options) -> llama_cpp.Llama:
    """The model in real llama.cpp, on the CPU, with an unquantised float32 KV cache."""
    settings = {"n_ctx": 128, "n_batch": 128, "n_threads": 2, "logits_all": True, "verbose": False,
                "n_gpu_layers": 0, "type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(path), **settings | options)


def llama_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """llama.cpp's logits [length, vocab] for the token ids [length]."""
    model = load_llama(path)
    try:
        model.eval([int(token) for token in tokens])
        return np.array(model.scores[:len(tokens)])
    finally:
        model.close()


def llama_ids(model: llama_cpp.Llama, text: str, *, special: bool = True) -> list[int]:
    """llama.cpp's token ids of `text`, special tokens in it recognised, none added."""
    raw = text.encode()
    ids = (llama_cpp.llama_token * (len(raw) + 8))()
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    count = llama_cpp.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, special)
    assert count >= 0
    return list(ctypes.cast(ids, ctypes.POINTER(llama_cpp.llama_token * count)).contents) if count else []
