"""What a checkpoint becomes in ONNX: tensors, file names and config.json, before any byte.

The layout serves onnxruntime-genai, transformers.js and plain onnxruntime at once: Hugging Face's tokenizer and
config.json beside genai_config.json, the graph where transformers.js looks for it (`onnx/model_q4.onnx` with its data
in `onnx/model_q4.onnx_data`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import numpy as np

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.folder_package import provenance
from optrot_edge.exporters.hf_config import hf_config
from optrot_edge.exporters.onnx_blocks import check_grid
from optrot_edge.gridspec import GridSpec, grid_spec
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX, Family

FLOATS = {"cpu": ("float32",), "cuda": ("float16",), "dml": ("float16",), "webgpu": ("float16", "float32")}
"""What each execution provider's fused attention computes in, its usual first (onnxruntime-genai's builder)."""
ACCURACY_LEVELS = (0, 4)  # of MatMulNBits: float activations, or int8 ones
_TRANSFORMERS_JS = {(4, "float32"): ("model_q4", "q4"), (4, "float16"): ("model_q4f16", "q4f16"),
                    (None, "float32"): ("model", "fp32"), (None, "float16"): ("model_fp16", "fp16")}


@dataclass(frozen=True)
class Entry:
    """A tensor's numpy dtype and shape in the file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the checkpoint (`source`); `stem` is its Hugging Face name without ".weight", `spec` its grid or
    None for floats."""

    source: str
    stem: str
    shape: tuple[int, ...]
    spec: GridSpec | None

    def entries(self, dtype: str) -> dict[str, Entry]:
        """What the file may hold of it, by part; of a float matrix "weight" [out, in] or "weight_t" [in, out]."""
        if self.spec is None:
            return {"weight": Entry(dtype, self.shape), "weight_t": Entry(dtype, self.shape[::-1])}
        (rows, columns), bits = self.shape, self.spec.bits
        blocks = columns // self.spec.group_size
        found = {"qweight": Entry("uint8", (rows, blocks, self.spec.group_size * bits // 8)),
                 "scales": Entry(dtype, (rows, blocks))}
        return found | ({"qzeros": Entry("uint8", (rows, -(-blocks * bits // 8)))} if self.spec.kind == "zero" else {})

    def nbytes(self, dtype: str) -> int:
        """Bytes in the file."""
        entries = self.entries(dtype)
        return entries["weight"].nbytes if self.spec is None else sum(entry.nbytes for entry in entries.values())


@dataclass
class Plan:
    """Everything but the tensors' data, which `tensors` names by their canonical names; `config` is config.json."""

    family: Family
    model: ModelConfig
    tensors: dict[str, PlannedTensor]
    dtype: str
    execution_provider: str
    accuracy_level: int
    r3_block: int | None
    r4_block: int | None
    name: str
    config: dict
    notes: list[str]

    @property
    def filename(self) -> str:
        """The graph's file in the package."""
        return f"onnx/{self.name}.onnx"

    @property
    def data_name(self) -> str:
        """The file of the tensors, beside the graph."""
        return f"{self.name}.onnx_data"

    @property
    def head(self) -> str:
        """Canonical name of the head's matrix."""
        return "embed_tokens.weight" if self.model.tie_word_embeddings else "lm_head.weight"

    @property
    def weights(self) -> int:
        """Number of the model's weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors."""
        return sum(tensor.nbytes(self.dtype) for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over all weights."""
        return 8 * self.nbytes / self.weights


def usual_dtype(execution_provider: str) -> str:
    """What packages for an execution provider are usually in; InputError for an unknown one."""
    if execution_provider not in FLOATS:
        raise InputError(f"--execution-provider {execution_provider}: use {', '.join(FLOATS)}")
    return FLOATS[execution_provider][0]


def check_target(execution_provider: str, accuracy_level: int, dtype: str) -> None:
    """InputError unless a package can be made for that."""
    usual_dtype(execution_provider)
    if accuracy_level not in ACCURACY_LEVELS:
        raise InputError(f"--accuracy-level {accuracy_level}: use 0 (float activations) or 4 (int8 ones)")
    if dtype not in FLOATS[execution_provider]:
        raise InputError(f"--execution-provider {execution_provider} computes in "
                         f"{' or '.join(FLOATS[execution_provider])}, and this package is {dtype}; choose another, or "
                         "quantise again with another --dtype")


def plan_onnx(checkpoint: QuantizedCheckpoint, *, execution_provider: str = "cpu", accuracy_level: int = 0) -> Plan:
    """Plan the ONNX package of `checkpoint`.

    Raises InputError for grids that onnxruntime lacks or of different dtypes, and for a checkpoint whose tensors
    contradict its model configuration.
    """
    family, config, shapes = expected_tensors(checkpoint)
    stored = checkpoint.manifest["tensors"]
    tensors = {}
    for name, shape in shapes.items():
        spec = grid_spec(stored[name]["grid"]) if "grid" in stored[name] else None
        if spec is not None:
            check_grid(spec, name)
        stem = (name if name == HEAD_MIX else family.hf_name(name)).removesuffix(".weight")
        tensors[name] = PlannedTensor(name, stem, shape, spec)
    dtype, notes = _dtype(checkpoint, tensors), list(checkpoint.manifest.get("notes") or [])
    check_target(execution_provider, accuracy_level, dtype)
    rotation = checkpoint.manifest.get("rotation") or {}
    sizes: Counter = Counter()
    for tensor in tensors.values():
        if tensor.spec is not None:
            sizes[tensor.spec.bits] += prod(tensor.shape)
    bits = sizes.most_common(1)[0][0] if sizes else None
    name, js_dtype = _TRANSFORMERS_JS.get((bits, dtype), ("model_quantized", "q8"))
    about = provenance(checkpoint.manifest, config, "onnx")
    about |= {"accuracy_level": accuracy_level, "execution_provider": execution_provider}
    embedding = tensors["embed_tokens.weight"].spec
    if embedding is not None:  # its rows may be decoded by operators that do not tell
        about["embedding"] = {"bits": embedding.bits, "group_size": embedding.group_size}
    about_js = {"dtype": js_dtype, "use_external_data_format": {f"{name}.onnx": 1},
                "kv_cache_dtype": {js_dtype: dtype}}
    shape = hf_config(family, config) | {"torch_dtype": dtype, "transformers.js_config": about_js, "optrot": about}
    return Plan(family, config, tensors, dtype, execution_provider, accuracy_level, rotation.get("r3_block"),
                rotation.get("r4_block"), name, shape, notes)


def _dtype(checkpoint: QuantizedCheckpoint, tensors: dict[str, PlannedTensor]) -> str:
    """The one dtype of all scales, or what the recipe says where nothing is quantised."""
    found = {tensor.spec.scale_dtype for tensor in tensors.values() if tensor.spec is not None}
    if len(found) > 1:
        raise InputError(f"{checkpoint.path} holds scales of {' and '.join(sorted(found))}; an ONNX package has one "
                         "dtype: quantise again with --format onnx")
    recipe = checkpoint.manifest.get("recipe") or {}
    return found.pop() if found else recipe.get("dtype") or "float32"
