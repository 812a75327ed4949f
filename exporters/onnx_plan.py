"""What a checkpoint becomes in ONNX: tensors, file names and config.json, before any byte.

The layout serves onnxruntime-genai, transformers.js and plain onnxruntime at once: Hugging Face's tokenizer and
config.json beside genai_config.json, the graph where transformers.js looks for it (`onnx/model_q4.onnx` with its data
in `onnx/model_q4.onnx_data`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from math import prod

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.expected_tensors import expected_tensors
from optrot_edge.exporters.folder_package import (
    ENTRY_DTYPES,
    PackagePlan,
    PlannedTensor,
    package_dtype,
    planned_tensors,
    provenance,
)
from optrot_edge.exporters.hf_config import hf_config
from optrot_edge.exporters.onnx_blocks import check_grid
from optrot_edge.exporters.safetensors_file import Entry
from optrot_edge.gridspec import grid_spec
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family

FLOATS = {"cpu": ("float32",), "cuda": ("float16",), "dml": ("float16",), "webgpu": ("float16", "float32")}
"""What each execution provider's fused attention computes in, its usual first (onnxruntime-genai's builder)."""
ACCURACY_LEVELS = (0, 4)  # of MatMulNBits: float activations, or int8 ones
_TRANSFORMERS_JS = {(4, "float32"): ("model_q4", "q4"), (4, "float16"): ("model_q4f16", "q4f16"),
                    (None, "float32"): ("model", "fp32"), (None, "float16"): ("model_fp16", "fp16")}


@dataclass(kw_only=True)
class Plan(PackagePlan):
    """An ONNX package, for a family's `model`; `name` is the graph's."""

    too_large = "choose --dtype float32, with --execution-provider cpu or webgpu"

    family: Family
    model: ModelConfig
    execution_provider: str
    accuracy_level: int
    name: str

    def entries(self, tensor: PlannedTensor) -> dict[str, Entry]:
        """What the file may hold of a tensor, by part; of a float matrix "weight" [out, in] or "weight_t" [in, out]."""
        floats = ENTRY_DTYPES[self.dtype]
        if tensor.spec is None:
            return {"weight": Entry(floats, tensor.shape), "weight_t": Entry(floats, tensor.shape[::-1])}
        (rows, columns), bits = tensor.shape, tensor.spec.bits
        blocks = columns // tensor.spec.group_size
        found = {"qweight": Entry("U8", (rows, blocks, tensor.spec.group_size * bits // 8)),
                 "scales": Entry(floats, (rows, blocks))}
        return found | ({"qzeros": Entry("U8", (rows, -(-blocks * bits // 8)))} if tensor.spec.kind == "zero" else {})

    def size_of(self, tensor: PlannedTensor) -> int:
        """Bytes of a tensor in the package."""
        entries = self.entries(tensor)
        return entries["weight"].nbytes if tensor.spec is None else sum(entry.nbytes for entry in entries.values())

    @cached_property
    def joined(self) -> dict[str, tuple[str, list[PlannedTensor]]]:
        """By canonical name, q, k and v that one matrix of the file holds: its module, and the three in its order.

        As the builder does: where the three have one grid, but for DirectML, and not with R3, which comes between them
        and the attention.
        """
        found = {}
        if self.execution_provider == "dml" or self.r3_block:
            return found
        for index in range(self.model.num_hidden_layers):
            names = [f"layers.{index}.{letter}_proj" for letter in "qkv"]
            matrices = [self.by_name[f"{name}.weight"] for name in names]
            biases = [self.by_name[f"{name}.bias"] for name in names if f"{name}.bias" in self.by_name]
            if matrices[0].spec is None or any(tensor.spec != matrices[0].spec for tensor in matrices):
                continue
            for group in (matrices, biases):
                module = matrices[0].module.replace("q_proj", "qkv_proj")
                found |= {tensor.source: (module, group) for tensor in group}
        return found

    def place(self, tensor: PlannedTensor) -> tuple[str, slice]:
        """The module of the file that holds a tensor, and the rows there."""
        module, group = self.joined.get(tensor.source, (tensor.module, [tensor]))
        start = sum(other.shape[0] for other in group[:group.index(tensor)])
        return module, slice(start, start + tensor.shape[0])

    @cached_property
    def by_name(self) -> dict[str, PlannedTensor]:
        """The tensors by their canonical names."""
        return {tensor.source: tensor for tensor in self.tensors}

    @property
    def r3_block(self) -> int | None:
        """Block of R3, None without."""
        return self.config["optrot"]["r3_block"]

    @property
    def r4_block(self) -> int | None:
        """Block of R4, None without."""
        return self.config["optrot"]["r4_block"]

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
    specs = {name: grid_spec(stored[name]["grid"]) if "grid" in stored[name] else None for name in shapes}
    for name, spec in specs.items():
        if spec is not None:
            check_grid(spec, name)
    dtype = package_dtype(checkpoint, specs, "onnx", "float32")
    check_target(execution_provider, accuracy_level, dtype)
    sizes: Counter = Counter()
    for name, spec in specs.items():
        if spec is not None:
            sizes[spec.bits] += prod(shapes[name])
    bits = sizes.most_common(1)[0][0] if sizes else None
    name, js_dtype = _TRANSFORMERS_JS.get((bits, dtype), ("model_quantized", "q8"))
    about = provenance(checkpoint.manifest, config, "onnx")
    about |= {"accuracy_level": accuracy_level, "execution_provider": execution_provider}
    if (embedding := specs["embed_tokens.weight"]) is not None:  # operators that decode its rows do not tell
        about["embedding"] = {"bits": embedding.bits, "group_size": embedding.group_size}
    about_js = {"dtype": js_dtype, "use_external_data_format": {f"{name}.onnx": 1}}
    shape = hf_config(family, config) | {"torch_dtype": dtype, "transformers.js_config": about_js, "optrot": about}
    return Plan(config=shape, dtype=dtype, tensors=planned_tensors(family, shapes, specs),
                notes=list(checkpoint.manifest.get("notes") or []), family=family, model=config,
                execution_provider=execution_provider, accuracy_level=accuracy_level, name=name)
