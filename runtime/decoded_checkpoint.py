"""A quantised checkpoint as a torch model: its codes decoded to the weights that devices compute with."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from optrot_edge.checkpoint import QuantizedCheckpoint, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX
from optrot_edge.runtime.imports import require


class DecodedCheckpoint:
    """Offers what `optrot_edge.models.forward` asks of a model, decoding one layer at a time.

    checkpoint: a folder or an open QuantizedCheckpoint. Raises InputError for a damaged one.
    """

    kind = "checkpoint"

    def __init__(self, checkpoint: str | Path | QuantizedCheckpoint):
        is_open = isinstance(checkpoint, QuantizedCheckpoint)
        self.checkpoint = checkpoint if is_open else QuantizedCheckpoint(checkpoint)
        self.path = self.checkpoint.path
        manifest = self.checkpoint.manifest
        if not isinstance(manifest.get("model"), dict) or not isinstance(manifest.get("tensors"), dict):
            raise InputError(f"{self.path}: the manifest lacks `model` or `tensors`; quantise again")
        self.config = ModelConfig.from_dict(manifest["model"])
        rotation = manifest.get("rotation") or {}
        self.r3_block: int | None = rotation.get("r3_block")
        self.r4_block: int | None = rotation.get("r4_block")

    def _tensor(self, name: str, dtype):
        torch = require("torch", "learn", "decoding a checkpoint")
        return torch.from_numpy(self.checkpoint.weights(name)).to(dtype or torch.float32)

    def layer(self, index: int, dtype=None) -> dict:
        """Decoder layer `index` under canonical names (float32 unless `dtype` says otherwise)."""
        prefix = f"layers.{index}."
        names = [name for name in self.checkpoint.names if name.startswith(prefix)]
        if not names:
            raise InputError(f"{self.path}: no layer {index}")
        return {name.removeprefix(prefix): self._tensor(name, dtype) for name in names}

    def embedding(self, dtype=None):
        """Token embedding [vocab, hidden]."""
        return self._tensor("embed_tokens.weight", dtype)

    def final_norm(self, dtype=None):
        """Gain of the last norm [hidden]."""
        return self._tensor("norm.weight", dtype)

    def head_mix(self, dtype=None):
        """The linear [hidden, hidden] through which the head is tied to the embedding, or None."""
        return self._tensor(HEAD_MIX, dtype) if self.config.head_mix else None

    def lm_head(self, dtype=None):
        """Output head [vocab, hidden], None when tied to the embedding."""
        if "lm_head.weight" not in self.checkpoint:
            if not self.config.tie_word_embeddings:
                raise InputError(f"{self.path}: the head is untied but lm_head.weight is missing")
            return None
        return self._tensor("lm_head.weight", dtype)

    @property
    def stored_bits_per_weight(self) -> float:
        """Bits per weight as a package stores them: codes at their width, scales and offsets included."""
        bits = weights = 0.0
        for name, entry in self.checkpoint.manifest["tensors"].items():
            count = prod(entry["shape"])
            if "grid" in entry:
                width = grid_spec(entry["grid"]).bits_per_weight
            else:
                width = 16 if name in self.checkpoint.bfloat16 else 8 * np.dtype(entry["dtype"]).itemsize
            bits, weights = bits + count * width, weights + count
        return bits / weights
