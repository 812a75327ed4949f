"""An ONNX package by its genai_config.json and the graph that names. Needs onnx, neither onnxruntime nor torch.

`model.decoder` of genai_config.json (onnxruntime-genai 0.18) names the graph, relative to the folder, and the graph's
inputs and outputs. Quantised matrices are `MatMulNBits` or `GatherBlockQuantized` (com.microsoft) or
`DequantizeLinear`; a tied matrix feeds two of them and is stored once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.models.hf_config import read_json
from optrot_edge.models.optrot_entry import read_entry

GENAI_CONFIG = "genai_config.json"
_AGAIN = "export or download the package again"
_TABLES = re.compile(r"(cos|sin)_cache|hadamard_\d+")  # the builder's names, and the exporter's: no weights
_COUNTERS = ("INT64", "INT32", "BOOL", "STRING")  # shapes and positions
# Places of codes, scales and zero-points among an operator's inputs.
_QUANTISED = {"MatMulNBits": (1, 2, 3), "GatherBlockQuantized": (0, 2, 3), "DequantizeLinear": (0, 1, 2)}


@dataclass(frozen=True)
class OnnxTensor:
    """A matrix or vector: `kind` such as "4-bit g32" or "float16", how many weights, and all bits stored for them."""

    kind: str
    weights: int
    bits: int


def is_onnx(folder: str | Path) -> bool:
    """Whether a folder is an ONNX package: its config.json says so, or it has genai_config.json or a graph.

    Not a model's folder that holds its weights as safetensors besides. Raises InputError when config.json cannot be
    read.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        ours = read_json(folder / "config.json").get("optrot")
        if isinstance(ours, dict) and "format" in ours:
            return ours["format"] == "onnx"
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return False
    return (folder / GENAI_CONFIG).is_file() or any(folder.glob("*.onnx")) or any(folder.glob("onnx/*.onnx"))


class OnnxFolder:
    """What onnxruntime-genai would load from `path`; the graph is read, its external data only measured.

    genai: genai_config.json. config: config.json, empty where there is none. optrot: what optrot-edge wrote into it.
    filename: the graph relative to the folder, graph: its path, model: its onnx.ModelProto without external data.

    Raises InputError for what is missing or damaged, and for a newer optrot-edge's package.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not (self.path / GENAI_CONFIG).is_file():
            raise InputError(f"{self.path}: no {GENAI_CONFIG}, so this is not a whole ONNX package; {_AGAIN}")
        self.genai = read_json(self.path / GENAI_CONFIG)
        config = self.path / "config.json"  # onnxruntime-genai's builder writes none
        self.config = read_json(config) if config.is_file() else {}
        self.optrot = read_entry(self.path, self.config)
        self.decoder, self.filename = self._find_graph()
        self.graph = self.path / self.filename
        self.model = self._read_graph()
        self.data = self._find_data()

    def _find_graph(self) -> tuple[dict, str]:
        model = self.genai.get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        name = decoder.get("filename") if isinstance(decoder, dict) else None
        if not isinstance(name, str) or not name:
            raise InputError(f"{self.path / GENAI_CONFIG} names no graph (model.decoder.filename); {_AGAIN}")
        if not (self.path / name).is_file():
            raise InputError(f"{self.path}: the graph {name} is missing; {_AGAIN}")
        for key in ("num_hidden_layers", "num_key_value_heads", "head_size"):
            if not isinstance(decoder.get(key), int) or decoder[key] < 1:
                raise InputError(f"{self.path / GENAI_CONFIG}: model.decoder.{key} is {decoder.get(key)!r}; {_AGAIN}")
        for key in ("inputs", "outputs"):
            names = decoder.setdefault(key, {})
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise InputError(f"{self.path / GENAI_CONFIG}: model.decoder.{key} is no object of names; {_AGAIN}")
        return decoder, name

    def _read_graph(self):
        try:
            import onnx
        except ImportError as error:
            raise InputError('an ONNX package needs onnx, which is not installed; run: pip install '
                             '"optrot-edge[onnx]"') from error
        try:
            model = onnx.load(self.graph, load_external_data=False)
        except Exception as error:  # protobuf's DecodeError, wherever this version keeps it
            raise InputError(f"{self.graph} is truncated or damaged: {error}; {_AGAIN}") from None
        if not model.graph.node:
            raise InputError(f"{self.graph} holds no graph; {_AGAIN}")
        return model

    def _find_data(self) -> list[Path]:
        """The files of the graph's external data; InputError where one is missing or too short."""
        needed: dict[str, int] = {}
        for tensor in self.model.graph.initializer:
            if tensor.data_location == 1:  # TensorProto.EXTERNAL
                about = {entry.key: entry.value for entry in tensor.external_data}
                name, end = about.get("location", ""), int(about.get("offset", 0)) + int(about.get("length", 0))
                needed[name] = max(end, needed.get(name, 0))
        for name, size in needed.items():
            file = self.graph.parent / name
            if not file.is_file():
                raise InputError(f"{file} is missing: a package moved without its external data; keep that file beside "
                                 f"{self.graph.name}")
            if file.stat().st_size < size:
                raise InputError(f"{file} is truncated: {file.stat().st_size} bytes of at least {size}; {_AGAIN}")
        return [self.graph.parent / name for name in needed]

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return max((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)

    @property
    def context_length(self) -> int | None:
        """The model's context in tokens, None where genai_config.json does not tell."""
        length = self.genai["model"].get("context_length")
        return length if isinstance(length, int) and length > 0 else None

    @property
    def missing_window(self) -> int | None:
        """The sliding window of genai_config.json or config.json where the graph's attention has none, else None.

        The builder gives Mistral's graphs none: it leaves that to onnxruntime-genai, which drops keys and values, or,
        with windowed_kv_cache=false, to nobody (genai 0.18).
        """
        stated = self.decoder.get("sliding_window")
        window = stated.get("window_size") if isinstance(stated, dict) else None
        if window is None and self.config.get("use_sliding_window", True):
            window = self.config.get("sliding_window")
        nodes = [node for node in self.model.graph.node if node.op_type == "GroupQueryAttention"]
        everywhere = nodes and all(_attribute(node, "local_window_size", -1) < 0 for node in nodes)
        return window if isinstance(window, int) and everywhere else None

    # accuracy level

    def _products(self, model) -> list:
        return [node for node in model.graph.node if node.op_type == "MatMulNBits"]

    @property
    def accuracy_level(self) -> int | None:
        """Stored accuracy level of the MatMulNBits (0 unset, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations).

        The highest where they differ; None without a MatMulNBits.
        """
        return max((_attribute(node, "accuracy_level", 0) for node in self._products(self.model)), default=None)

    def at_accuracy_level(self, level: int) -> bytes:
        """The graph with another accuracy level, its external data still by name. InputError where it has none."""
        if not 0 <= level <= 4:
            raise InputError(f"accuracy level {level}: 0 (unset), 1 (float32), 2 (float16), 3 (bfloat16) or 4 (int8) "
                             "can be had")
        if self.accuracy_level is None:
            raise InputError(f"{self.path}: the graph has no MatMulNBits, so no accuracy level can be chosen")
        model = type(self.model)()
        model.CopyFrom(self.model)
        for node in self._products(model):
            entry = next((entry for entry in node.attribute if entry.name == "accuracy_level"), None)
            entry = node.attribute.add() if entry is None else entry
            entry.name, entry.type, entry.i = "accuracy_level", 2, level  # AttributeProto.INT
        return model.SerializeToString()

    # what is stored

    @cached_property
    def tensors(self) -> dict[str, OnnxTensor]:
        """Every stored matrix and vector by its name in the graph. Tables of RoPE and of the Hadamard transforms are
        of kind "tables": bits, and no weights."""
        stored = {tensor.name: tensor for tensor in self.model.graph.initializer}
        found, counted = {}, set()
        for node in self.model.graph.node:
            if node.op_type in _QUANTISED and (entry := self._quantised(node, stored)):
                name, tensor, parts = entry
                found.setdefault(name, tensor)
                counted |= parts
        for name, tensor, parts in self._looked_up(stored):
            found.setdefault(name, tensor)
            counted |= parts
        for name, tensor in stored.items():
            kind, bits = _dtype(tensor)
            if name in counted or kind in _COUNTERS:
                continue
            table = _TABLES.match(name)
            found[name] = OnnxTensor("tables" if table else {"FLOAT": "float32"}.get(kind, kind.lower()),
                                     0 if table else prod(tensor.dims), bits)
        return found

    def _looked_up(self, stored: dict) -> list[tuple[str, OnnxTensor, set[str]]]:
        """The same of an embedding whose rows stock operators decode: the graph does not tell its grid, we do."""
        about, name = self.optrot.get("embedding"), "model.embed_tokens.qweight"
        if not isinstance(about, dict) or name not in stored:
            return []
        parts = {part for part in (name, name.replace("qweight", "scales"), name.replace("qweight", "qzeros"))
                 if part in stored}
        weights, bits = _dtype(stored[name])[1] // about["bits"], sum(_dtype(stored[part])[1] for part in parts)
        return [(name, OnnxTensor(f"{about['bits']}-bit g{about['group_size']}", weights, bits), parts)]

    def _quantised(self, node, stored: dict) -> tuple[str, OnnxTensor, set[str]] | None:
        """Name and numbers of the matrix that `node` takes, and the names of its parts; None where it is not stored."""
        inputs = [node.input[place] if place < len(node.input) else "" for place in _QUANTISED[node.op_type]]
        inputs[0] = self._reshaped.get(inputs[0], inputs[0])
        if inputs[0] not in stored or inputs[1] not in stored:
            return None
        kind, total = _dtype(stored[inputs[0]])
        width = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}.get(kind, 8)
        if node.op_type != "DequantizeLinear" and kind in ("UINT8", "INT8"):
            width = _attribute(node, "bits", 4)
        weights = total // width
        if node.op_type == "MatMulNBits":
            weights = _attribute(node, "N", 0) * _attribute(node, "K", 0)  # a last block may be padded
        block = _attribute(node, "block_size", 0) or weights // max(1, prod(stored[inputs[1]].dims))
        parts = {name for name in inputs if name in stored}
        bits = sum(_dtype(stored[name])[1] for name in parts)
        return inputs[0], OnnxTensor(f"{width}-bit g{block}", weights, bits), parts

    @cached_property
    def _reshaped(self) -> dict[str, str]:
        """Reshaped values by what they are reshaped from: the embedding of a tied matrix is one."""
        return {node.output[0]: node.input[0] for node in self.model.graph.node if node.op_type == "Reshape"}

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of all tensors, tables too, over their number of weights."""
        tensors = self.tensors.values()
        return sum(tensor.bits for tensor in tensors) / max(1, sum(tensor.weights for tensor in tensors))


def _attribute(node, name: str, default: int) -> int:
    return next((entry.i for entry in node.attribute if entry.name == name), default)


def _dtype(tensor) -> tuple[str, int]:
    """ONNX's name of a tensor's type, and the bits of all its elements."""
    value = tensor.DESCRIPTOR.enum_types_by_name["DataType"].values_by_number.get(tensor.data_type)
    name = value.name if value else f"type{tensor.data_type}"
    width = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8, "STRING": 0}.get(name) or int((re.findall(r"\d+", name) or [8])[0])
    return name, width * prod(tensor.dims)
