"""ONNX through onnxruntime and onnxruntime-genai: logits, tokens, chat, speed."""

from __future__ import annotations

import importlib.metadata
import warnings
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.models.onnx_folder import OnnxFolder
from optrot_edge.runtime.hf_backend import HfBackend
from optrot_edge.runtime.onnx_generation import Generation
from optrot_edge.runtime.onnx_session import GraphSession, import_onnxruntime


class OnnxBackend(HfBackend):
    """One ONNX package: logits come from its graph in onnxruntime, text and speed from onnxruntime-genai.

    path: the folder, written by the exporter or by onnxruntime-genai's model builder. n_ctx: longest sequence in
    tokens, None for the model's own context (unlimited where genai_config.json states none). n_batch: tokens per step
    of a prompt. device: "cpu", "cuda", "dml" or "webgpu". accuracy_level: run the graph's MatMulNBits at another level
    than they are stored with, 0 (float32 on a CPU) or 4 (int8 activations). Only one of the two runtimes holds the
    model at a time. Raises InputError when the package cannot be loaded.
    """

    runtime = "onnxruntime"

    def __init__(self, path: str | Path, n_ctx: int | None = None, *, n_batch: int = 512, device: str = "cpu",
                 accuracy_level: int | None = None):
        self._session = self._generation = None
        if n_ctx is not None and n_ctx < 1:
            raise InputError(f"n_ctx is {n_ctx}; at least 1 is needed")
        self._ort = import_onnxruntime()
        self.path, self.n_batch, self.device = Path(path), n_batch, device
        self._folder = folder = OnnxFolder(self.path)
        self._edited = None if accuracy_level is None else folder.at_accuracy_level(accuracy_level)
        self.accuracy_level = folder.accuracy_level if accuracy_level is None else accuracy_level
        self.context_length = folder.context_length or np.iinfo(np.int32).max
        self.n_ctx = n_ctx or self.context_length
        self._session = GraphSession(folder, device, self._edited)
        self.vocab_size = self._session.vocab_size
        if (window := folder.missing_window) and window < min(self.n_ctx, self.context_length):
            warnings.warn(f"{self.path.name}: the graph's attention has no window, though the package states one of "
                          f"{window} tokens: beyond those its logits are not the model's; use a --window of at most "
                          f"{window}", stacklevel=2)

    def _graph(self) -> GraphSession:
        if self._session is None:
            self._generation = None
            self._session = GraphSession(self._folder, self.device, self._edited)
        return self._session

    def _genai(self) -> Generation:
        if self._generation is None:
            self._session = None
            self._generation = Generation(self._folder, self.device, self._edited)
        return self._generation

    def __enter__(self) -> OnnxBackend:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; safe to call twice."""
        self._session = self._generation = None

    @property
    def name(self) -> str:
        """Folder name, model type, the types of its quantised matrices and their accuracy level."""
        kinds = {tensor.kind for tensor in self._folder.tensors.values() if "-bit g" in tensor.kind}
        level = [] if self.accuracy_level is None else [f"accuracy level {self.accuracy_level}"]
        about = [str(self._folder.genai["model"].get("type")), *sorted(kinds), *level]
        return f"{self.path.resolve().name} ({', '.join(about)})"

    @property
    def version(self) -> str:
        """Versions of onnxruntime and onnxruntime-genai."""
        names = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
        found = [version for version in map(_version, names) if version]
        return f"{self._ort.__version__}, genai {found[0]}" if found else self._ort.__version__

    # logits

    def logits(self, tokens) -> np.ndarray:
        """Logits float32 [n, vocab] of one sequence of token ids [n]. InputError if it does not fit."""
        ids = self._check_ids(tokens)
        if not ids.size:
            raise InputError("no tokens: logits need at least one")
        self._check_length(ids.size)
        out, done = np.empty((ids.size, self.vocab_size), np.float32), 0
        for rows in self._graph().steps(ids, self.n_batch):
            out[done:done + len(rows)] = rows
            done += len(rows)
        return out

    # text and speed

    def chat(self, prompt: str, max_tokens: int = 128) -> str:
        """Greedy answer to one user message through the package's chat template, as onnxruntime-genai reads it."""
        ids = self._tokenizer.tokenize(self._genai().prompt(prompt), special=True)
        return self.detokenize(self.generate(ids, max_tokens), special=False).strip()

    def generate(self, tokens, max_tokens: int) -> list[int]:
        """Greedy continuation of token ids, up to an end token or `max_tokens`."""
        ids = self._check_ids(tokens)
        if not ids.size:
            raise InputError("no tokens: a prompt needs at least one")
        self._check_length(ids.size + max_tokens)
        genai = self._genai()
        return [token for token in genai.steps(ids, max_tokens) if token not in genai.eos_ids]

    def speed(self, prompt_tokens: int = 256, decode_tokens: int = 64, repeats: int = 3) -> dict[str, float | None]:
        """Median tokens per second of onnxruntime-genai for reading a prompt and for writing one token at a time.

        Its loop keeps keys and values in place, as an app's would. Where genai cannot run the package, both are
        None, with a warning.
        """
        limit = min(self.n_ctx, self.context_length)
        decode_tokens = max(1, min(decode_tokens, limit // 2 - 1))
        prompt_tokens = max(1, min(prompt_tokens, limit - decode_tokens - 1))
        ids = np.random.default_rng(0).integers(0, self.vocab_size, prompt_tokens, dtype=np.int32)
        try:
            genai = self._genai()
            runs = [genai.timed(ids, 0 if left else decode_tokens) for left in reversed(range(repeats))]
        except InputError as error:  # the logits have been had without it
            warnings.warn(f"no speed: {error}", stacklevel=2)
            return {"prefill_tokens_per_s": None, "decode_tokens_per_s": None}
        return {"prefill_tokens_per_s": prompt_tokens / float(np.median([run[0] for run in runs])),
                "decode_tokens_per_s": 1 / float(np.median(runs[-1][1:]))}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
