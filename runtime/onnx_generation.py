"""A package in onnxruntime-genai: its chat template, greedy generation, speed."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.models.onnx_folder import OnnxFolder
from optrot_edge.runtime.imports import require
from optrot_edge.runtime.onnx_session import EXTERNAL_DATA, reason

# genai_config.json may ask for sampling or penalties.
_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "batch_size": 1, "temperature": 1.0,
           "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0, "diversity_penalty": 0.0}


class Generation:
    """A package loaded by onnxruntime-genai; arguments as `GraphSession`'s. Raises InputError when it does not load."""

    def __init__(self, folder: OnnxFolder, device: str, model: bytes | None = None):
        self._genai = genai = require("onnxruntime_genai", "onnx", "chat with an ONNX package")
        self._path = folder.path
        try:
            config = genai.Config(str(folder.path))
            config.clear_providers()
            if device != "cpu":
                config.append_provider(device)
            if model is not None:
                config.add_model_data(folder.filename, model)
                self._place_data(config, folder.filename)
            self._model = genai.Model(config)
        except Exception as error:  # RuntimeError mostly
            raise InputError(f"{folder.path}: onnxruntime-genai cannot load it: {reason(error)}") from error
        ends = folder.genai["model"].get("eos_token_id")
        self.eos_ids = set(ends if isinstance(ends, list) else [ends])

    @staticmethod
    def _place_data(config, filename: str) -> None:
        """Tell where the external data lies: relative to the package, unlike onnxruntime's own option (genai 0.18)."""
        entry = {EXTERNAL_DATA: Path(filename).parent.as_posix()}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": entry}}}))

    def prompt(self, message: str) -> str:
        """The text of one user message in the package's chat template. InputError without a usable one."""
        if not (self._path / "chat_template.jinja").is_file() and not _has_template(self._path):
            raise InputError(f"{self._path}: the tokenizer has no chat template")
        try:
            tokenizer = self._genai.Tokenizer(self._model)
        except Exception as error:  # of whatever kind the files are unusable
            raise InputError(f"{self._path}: onnxruntime-genai cannot load its tokenizer: {reason(error)}") from error
        try:
            return tokenizer.apply_chat_template(json.dumps([{"role": "user", "content": message}]),
                                                 add_generation_prompt=True)
        except Exception as error:  # a template is a program of the package's
            raise InputError(f"{self._path}: its chat template fails: {reason(error)}") from error

    def _start(self, length: int, **options):
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=length, **(_GREEDY | options))
        return self._genai.Generator(self._model, params)

    def steps(self, ids: np.ndarray, count: int) -> Iterator[int]:
        """At most `count` most likely next tokens one after another, up to and with an end token."""
        if count < 1:
            return
        with self._told():
            generator = self._start(len(ids) + count, min_length=0)
            generator.append_tokens(np.ascontiguousarray(ids, np.int32))
        while not generator.is_done():
            with self._told():
                generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def timed(self, ids: np.ndarray, count: int) -> np.ndarray:
        """Seconds of the prompt with its first token, then of `count` further tokens; end tokens do not end it."""
        length = len(ids) + count + 1
        with self._told():
            generator, times = self._start(length, min_length=length), [time.perf_counter()]
            generator.append_tokens(np.ascontiguousarray(ids, np.int32))
            for _ in range(count + 1):
                generator.generate_next_token()
                times.append(time.perf_counter())
        return np.diff(times)

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except Exception as error:  # RuntimeError mostly
            raise InputError(f"{self._path}: onnxruntime-genai cannot run it: {reason(error)}") from error


def _has_template(folder: Path) -> bool:
    """Whether tokenizer_config.json has the chat template, as transformers 4 wrote it."""
    try:
        return "chat_template" in json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
