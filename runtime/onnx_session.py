"""A package's graph in onnxruntime: logits of every position, keys and values carried from step to step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.models.onnx_folder import GENAI_CONFIG, OnnxFolder
from optrot_edge.runtime.imports import require

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider",
             "webgpu": "WebGpuExecutionProvider"}
_WHEELS = {"cuda": "onnxruntime-gpu and onnxruntime-genai-cuda", "dml": "onnxruntime-directml",
           "webgpu": "onnxruntime-webgpu"}
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8,
          "tensor(uint8)": np.uint8, "tensor(int64)": np.int64, "tensor(int32)": np.int32}
EXTERNAL_DATA = "session.model_external_initializers_file_folder_path"  # where a graph given as bytes has its data


def import_onnxruntime():
    """onnxruntime, or InputError that names the extra."""
    return require("onnxruntime", "onnx", "an ONNX package")


def reason(error: Exception) -> str:
    """One line of what onnxruntime or onnxruntime-genai raised: the end, where the cause stands."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", " ".join(str(error).split()))
    return text if len(text) < 400 else "... " + text[-400:]


def provider(device: str) -> str:
    """onnxruntime's name of a device; InputError for one that is unknown, or not in the onnxruntime installed here."""
    if device not in PROVIDERS:
        raise InputError(f"unknown device {device!r}; ONNX packages run on {', '.join(PROVIDERS)}")
    available = import_onnxruntime().get_available_providers()
    if PROVIDERS[device] not in available:
        raise InputError(f"the onnxruntime installed here has no {device} device (it has {', '.join(available)}); use "
                         f"--device cpu, or install {_WHEELS[device]} in its place")
    return PROVIDERS[device]


class GraphSession:
    """One graph, loaded. model: its bytes with another accuracy level, None for the file itself.

    vocab_size: width of the logits. Raises InputError when onnxruntime cannot load or run it.
    """

    def __init__(self, folder: OnnxFolder, device: str, model: bytes | None = None):
        self._folder = folder
        self._session = self._load(device, model)
        self._cache = self._pair_cache()
        self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._names = {name: folder.decoder["inputs"].get(name, name)
                       for name in ("input_ids", "attention_mask", "position_ids")}
        self._logits = folder.decoder["outputs"].get("logits", "logits")
        self._refuse_unknown()
        self._empty = {name: self._empty_cache(name) for name in self._cache}
        self.vocab_size, self._step = self._try()

    def _load(self, device: str, model: bytes | None):
        ort, folder = import_onnxruntime(), self._folder
        wanted, options = provider(device), ort.SessionOptions()
        options.log_severity_level = 4  # failures are told below
        if model is not None:
            options.add_session_config_entry(EXTERNAL_DATA, str(folder.graph.parent.resolve()))
        try:
            session = ort.InferenceSession(str(folder.graph) if model is None else model, options,
                                           providers=list(dict.fromkeys([wanted, PROVIDERS["cpu"]])))
        except Exception as error:  # of onnxruntime's own, which share no base
            if re.search("opset|IR version", str(error)):
                raise InputError(f"{folder.graph} (opset {folder.opset}) is newer than onnxruntime {ort.__version__}; "
                                 f"upgrade: pip install --upgrade onnxruntime. It says: {reason(error)}") from error
            raise InputError(f"{folder.graph}: onnxruntime cannot load it: {reason(error)}") from error
        if wanted not in session.get_providers():  # onnxruntime itself goes on without a word, on the CPU
            raise InputError(f"onnxruntime's {wanted} does not start here; use --device cpu")
        return session

    def _pair_cache(self) -> dict[str, str]:
        """Inputs of past keys and values, and the outputs that follow them."""
        inputs, outputs = self._folder.decoder["inputs"], self._folder.decoder["outputs"]
        declared, pairs = {entry.name for entry in self._session.get_inputs()}, {}
        for part in ("key", "value"):
            past = inputs.get(f"past_{part}_names", f"past_key_values.%d.{part}")
            present = outputs.get(f"present_{part}_names", f"present.%d.{part}")
            for layer in range(self._folder.decoder["num_hidden_layers"]):
                if (name := past.replace("%d", str(layer))) in declared:
                    pairs[name] = present.replace("%d", str(layer))
        return pairs

    def _refuse_unknown(self) -> None:
        if unknown := self._inputs.keys() - self._cache.keys() - set(self._names.values()):
            raise InputError(f"{self._folder.graph}: its input {min(unknown)} is unknown here; only decoders with a "
                             "cache of keys and values are run")
        outputs = {entry.name for entry in self._session.get_outputs()}
        if missing := {self._logits, *self._cache.values()} - outputs:
            raise InputError(f"{self._folder.graph} has no output {min(missing)}, which {GENAI_CONFIG} names")
        for name in self._cache:
            if self._inputs[name].type not in _TYPES or len(self._inputs[name].shape) != 4:
                raise InputError(f"{self._folder.graph}: a cache of {self._inputs[name].type} "
                                 f"{self._inputs[name].shape} cannot be fed from here; export it in float16 or float32")

    def _empty_cache(self, name: str) -> np.ndarray:
        """Past keys or values [1, heads, 0, head_size] of nothing."""
        about, (_, heads, _, size) = self._folder.decoder, self._inputs[name].shape
        heads = heads if isinstance(heads, int) else about["num_key_value_heads"]
        size = size if isinstance(size, int) else about["head_size"]  # the builder leaves it open
        return np.zeros((1, heads, 0, size), _TYPES[self._inputs[name].type])

    def _try(self) -> tuple[int, Callable[[int, int], int]]:
        """The width of the logits, and what a step's size becomes for a sequence of a length."""
        ids, nodes = np.zeros(4, np.int32), self._folder.model.graph.node
        fused = any(node.op_type == "GroupQueryAttention" for node in nodes)
        try:
            rows, width = next(self._steps(ids, len(ids))).shape
            if rows > 1 and fused:
                list(self._steps(ids, 2))
        except Exception as error:  # of onnxruntime's own
            raise InputError(f"{self._folder.graph}: onnxruntime cannot run it: {reason(error)}") from error
        if rows == 1:  # the graph keeps the last position's logits only (the builder's prune_lm_head)
            return width, lambda length, size: 1
        # The builder's mask without that operator (float16 for a CPU) fits one token after others, or all at once.
        return width, lambda length, size: size if fused else length

    def steps(self, ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Logits float32 [n, vocab] of `size` tokens after another, where the graph can do that."""
        return self._steps(ids, self._step(len(ids), size))

    def _steps(self, ids: np.ndarray, size: int) -> Iterator[np.ndarray]:
        cache = self._empty
        for start in range(0, len(ids), size):
            part, end = ids[None, start:start + size], min(start + size, len(ids))
            given = {"input_ids": part, "attention_mask": np.ones((1, end)),
                     "position_ids": np.arange(start, end)[None]}
            feed = {name: given[key].astype(_TYPES.get(self._inputs[name].type, np.int64))
                    for key, name in self._names.items() if name in self._inputs}
            logits, *present = self._session.run([self._logits, *self._cache.values()], feed | cache)
            cache = dict(zip(self._cache, present, strict=True))
            yield logits[0].astype(np.float32, copy=False)
