"""The reference: the model in plain torch, layer by layer, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optrot_edge.checkpoint import MANIFEST
from optrot_edge.errors import InputError
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.runtime.imports import require


class _Watched:
    """A model that tells `progress(done, total, what)` whenever a layer is read."""

    def __init__(self, model, progress):
        self._model, self._progress = model, progress

    def __getattr__(self, name):
        return getattr(self._model, name)

    def layer(self, index, dtype):
        self._progress(index, self._model.config.num_hidden_layers, "reference layers")
        return self._model.layer(index, dtype)


class TorchBackend:
    """A model in torch.

    model: a Hugging Face folder or hub id, a GGUF (dequantised), a quantised checkpoint folder (decoded),
    or an open object that `optrot_edge.models.forward` accepts. dtype: "float32" or "float64".
    device: "cpu", "cuda", "mps" or "auto". activations: bits that the inputs of all linears but the head are rounded
    to per token (see `optrot_edge.models.activations`), 16: none. Raises InputError.
    """

    runtime = "torch"

    def __init__(self, model, *, dtype: str = "float32", device: str = "cpu", activations: int = 16):
        self._torch = torch = require("torch", "learn", "the torch reference")
        if dtype not in ("float32", "float64"):
            raise InputError(f"unknown dtype {dtype!r} for the torch reference; use float32 or float64")
        from optrot_edge.models.activations import check_activations

        self.dtype, self.device = getattr(torch, dtype), self._choose(device)
        self.activations = check_activations(activations)
        self.model = self._open(model) if isinstance(model, str | Path) else model
        self.config = self.model.config
        self.vocab_size, self.context_length = self.config.vocab_size, self.config.max_position_embeddings

    @staticmethod
    def devices() -> list[str]:
        """The devices that torch can use here, the best first; InputError without torch."""
        torch = require("torch", "learn", "the torch reference")
        usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return [name for name, there in usable.items() if there]

    def _choose(self, device: str) -> str:
        if device == "auto":
            return self.devices()[0]
        if device not in self.devices():
            raise InputError(f"torch cannot use the device {device!r} here; use --device cpu")
        return device

    @staticmethod
    def _open(path: str | Path):
        if (Path(path) / MANIFEST).is_file():
            return DecodedCheckpoint(path)
        from optrot_edge.models import open_model

        return open_model(path)

    @property
    def name(self) -> str:
        """The model's path or, without one, the name in its config."""
        path = getattr(self.model, "path", None)
        return Path(path).name if path else self.config.name or self.config.family

    @property
    def version(self) -> str:
        """Version of torch and the number format of the computation."""
        return f"torch {self._torch.__version__} {str(self.dtype).removeprefix('torch.')} {self.device}"

    def __enter__(self) -> TorchBackend:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open."""

    def _check(self, tokens) -> np.ndarray:
        tokens = np.ascontiguousarray(tokens, dtype=np.int64)
        if tokens.ndim != 2 or not tokens.size:
            raise InputError(f"windows [b, n] of token ids are needed, not shape {list(tokens.shape)}")
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise InputError(f"token ids reach from {tokens.min()} to {tokens.max()}, but {self.name} knows "
                             f"0 to {self.vocab_size - 1}: another tokenizer made them")
        if tokens.shape[1] > self.context_length:
            raise InputError(f"{tokens.shape[1]} tokens do not fit the context of {self.context_length} "
                             f"tokens of {self.name}; use a shorter window")
        return tokens

    def iter_logits(self, tokens: np.ndarray, *, progress=None) -> Iterator[np.ndarray]:
        """Logits float32 [n, vocab] of each window of `tokens` [b, n].

        Every layer is read once, for all windows; only the hidden states [b, n, hidden] stay in memory.
        progress: called with (layers done, layers, what).
        """
        from optrot_edge.models.forward import final_hidden

        torch = self._torch
        tokens = self._check(tokens)
        model = _Watched(self.model, progress) if progress else self.model
        hidden = final_hidden(model, torch.from_numpy(tokens), dtype=self.dtype, device=self.device,
                              activations=self.activations)
        head = self.model.lm_head(self.dtype)
        head = (self.model.embedding(self.dtype) if head is None else head).to(self.device)
        for window in hidden:
            with torch.no_grad():
                logits = torch.nn.functional.linear(window.to(self.device), head)
            yield logits.to("cpu", torch.float32).numpy()

    def logits_batch(self, tokens: np.ndarray) -> np.ndarray:
        """Logits float32 [b, n, vocab] of windows [b, n]; `iter_logits` needs b times less memory."""
        return np.stack(list(self.iter_logits(tokens)))

    def logits(self, tokens) -> np.ndarray:
        """Logits float32 [n, vocab] of one sequence of token ids."""
        return next(self.iter_logits(np.asarray(tokens)[None]))
