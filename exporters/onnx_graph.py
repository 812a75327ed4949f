"""The graph of an ONNX package: onnxruntime-genai's own model builder, fed with frozen codes.

The builder (`onnxruntime_genai.models.builder`) draws the decoder as onnxruntime's fused operators; here its methods
get packed matrices instead of a Hugging Face model, so that codes, scales and zero-points reach `MatMulNBits` and
`GatherBlockQuantized` as they are. R3, R4 and a head tied through a matrix are ordinary nodes. Imports torch, as the
builder does. Checked against onnxruntime-genai 0.18.0.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime_genai.models.builders import LlamaModel, MistralModel, Qwen3Model, QwenModel
from onnxruntime_genai.models.builders.base import Model

from optrot_edge.exporters.onnx_blocks import pack
from optrot_edge.exporters.onnx_lookup import RowLookup
from optrot_edge.exporters.onnx_plan import Plan, PlannedTensor
from optrot_edge.models.family import HEAD_MIX

BUILDERS = {"llama": LlamaModel, "mistral": MistralModel, "qwen2": QwenModel, "qwen3": Qwen3Model}
ONE_MATRIX = 128  # largest Hadamard block that is one MatMul
_INLINE = 1024  # bytes up to which a tensor stays in the .onnx file
_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
Progress = Callable[[int, str], None]


def write_graph(plan: Plan, load: Callable[[str], object], folder: Path, progress: Progress) -> None:
    """Write the graph, its data and genai_config.json of `plan` into `folder`, which holds the tokenizer already.

    `load` gives a checkpoint's tensor by canonical name; `progress` is told (bytes, name) of each that is written.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # the builder tells what it does
        graph = _class(plan.model.family)(plan, load, folder, progress)
        graph.make_model("")
        graph.save_model(str(folder))
        graph.make_genai_config(graph.about, {}, str(folder))


@cache
def _class(family: str) -> type[Model]:
    return type("Graph", (_FrozenCodes, BUILDERS[family]), {})


class _Linear:
    """A matrix as the builder's methods look at it. Those of one `source` share their tensors in the file."""

    def __init__(self, tensor: PlannedTensor, bias: torch.Tensor | None = None):
        self.tensor, self.bias, self.g_idx = tensor, bias, None
        self.out_features, self.in_features = tensor.shape
        self.spec = tensor.spec
        if tensor.spec is not None:  # the builder tells quantised matrices by this attribute
            self.qweight, self.bits, self.group_size = True, tensor.spec.bits, tensor.spec.group_size


class _Gain:
    """A norm."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight


class _DecoderLayer:
    """A layer; the builder knows it by this name."""

    def __init__(self, get: Callable[[str], object]):
        self.input_layernorm, self.post_attention_layernorm = get("attn_norm"), get("mlp_norm")
        self.self_attn = SimpleNamespace(**{name: get(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj",
                                                                       "q_norm", "k_norm")})
        self.mlp = SimpleNamespace(**{name: get(name) for name in ("gate_proj", "up_proj", "down_proj")})


class _Weights:
    """What the builder walks over."""

    def __init__(self, plan: Plan, load: Callable[[str], object]):
        self.plan, self.load = plan, load
        self.embedding = SimpleNamespace(weight=_Linear(plan.tensors["embed_tokens.weight"]))
        self.final_norm = self._get("norm")
        self.lm_head = _Linear(plan.tensors[plan.head])

    def _get(self, stem: str):
        name = f"{stem}.weight"
        if name not in self.plan.tensors:
            return None
        tensor = self.plan.tensors[name]
        if len(tensor.shape) == 1:
            return _Gain(torch.from_numpy(self.load(name)))
        bias = f"{stem}.bias"
        return _Linear(tensor, torch.from_numpy(self.load(bias)) if bias in self.plan.tensors else None)

    def modules(self):
        """Embedding, layers, final norm, head."""
        yield self.embedding
        for index in range(self.plan.model.num_hidden_layers):
            yield _DecoderLayer(lambda stem, index=index: self._get(f"layers.{index}.{stem}"))
        yield self.final_norm
        yield self.lm_head


class _FrozenCodes(RowLookup):
    """What goes before the builder's class of a family."""

    def __init__(self, plan: Plan, load, folder: Path, progress: Progress):
        self.plan, self.load, self.progress, self.about = plan, load, progress, _about(plan, folder)
        self.stored: dict[str, str] = {}
        options = {"hf_token": False, "windowed_kv_cache": False, "filename": plan.filename,
                   "accuracy_level": plan.accuracy_level, "use_webgpu_fp32": plan.dtype == "float32"}
        # INT4: the builder's word for "its matrices are packed"; each brings its own bits
        super().__init__(self.about, _DTYPES[plan.dtype], ir.DataType.INT4, plan.execution_provider, str(folder),
                         options)
        for name in ("past_key_values.key", "past_key_values.value"):  # transformers.js wants a number
            self.input_shapes[name] = [*self.input_shapes[name][:3], self.head_size]
        for name in ("present.key", "present.value"):
            self.output_shapes[name] = [*self.output_shapes[name][:3], self.head_size]

    # what the builder would read from files

    def load_weights(self, input_path: str) -> _Weights:
        return _Weights(self.plan, self.load)

    def make_rope_init(self, config) -> None:
        """Nothing: the tables are ours."""

    def make_rotary_embedding_caches_from_scratch(self):
        config = self.plan.model
        angles = np.outer(np.arange(config.max_position_embeddings, dtype=np.float64), config.rope_inv_freq())
        return torch.from_numpy(np.cos(angles).astype(np.float32)), torch.from_numpy(np.sin(angles).astype(np.float32))

    def make_constant(self, name: str) -> None:
        super().make_constant(name)
        value = self.values[name]  # the builder says that lists are scalars
        value.shape = value.producer().attributes["value"].as_tensor().shape

    # matrices

    def _parts(self, linear: _Linear) -> dict[str, str]:
        """Names of a packed matrix's tensors by part, in MatMulNBits' order; they are written once per source."""
        tensor = linear.tensor
        for part in (entries := tensor.entries(self.plan.dtype)):
            self._store(f"{tensor.stem}.{part}", tensor, part)
        return {part: f"{tensor.stem}.{part}" for part in entries}

    def _store(self, name: str, tensor: PlannedTensor, part: str) -> None:
        if name in self.stored:
            return
        self.stored[name] = part
        entry = tensor.entries(self.plan.dtype)[part]

        def read() -> ir.Tensor:
            self.progress(entry.nbytes, name)
            return ir.Tensor(np.ascontiguousarray(arrays(tensor, self.load, self.plan.dtype)[part]), name=name)

        self.make_initializer(ir.LazyTensor(read, dtype=ir.DataType.from_numpy(np.dtype(entry.dtype)),
                                            shape=ir.Shape(entry.shape), name=name), name)

    def make_matmul_nbits(self, matmul, basename: str, root_input: str, **kwargs) -> str:
        if matmul.spec is None:
            name, last = basename, matmul.out_features
            self._store(f"{matmul.tensor.stem}.weight_t", matmul.tensor, "weight_t")
            inputs, attributes = [root_input, f"{matmul.tensor.stem}.weight_t"], {}
        else:
            name, last, spec = f"{basename}NBits", matmul.out_features, matmul.spec
            inputs = [root_input, *self._parts(matmul).values()]
            attributes = {"domain": "com.microsoft", "accuracy_level": self.plan.accuracy_level, "bits": spec.bits,
                          "block_size": spec.group_size, "K": matmul.in_features, "N": matmul.out_features}
        output = "logits" if kwargs.get("logits") else f"{name}/output_0"
        self.make_node("MatMulNBits" if matmul.spec else "MatMul", inputs=inputs, outputs=[output], name=name,
                       **attributes)
        self.make_value(output, self.io_dtype, shape=self.make_hidden_state_shape(last_dim=last))
        return name

    def make_matmul(self, matmul, basename: str, root_input: str, **kwargs) -> str:
        if basename.endswith("/mlp/down_proj/MatMul") and self.plan.r4_block:
            root_input = self._hadamard(basename.replace("/MatMul", "/R4"), root_input, matmul.in_features,
                                        self.plan.r4_block)
        return self.make_matmul_nbits(matmul, basename, root_input, **kwargs)

    def is_packed_matmul_supported(self) -> bool:
        return False  # three matrices of their own types; fusing them gained nothing measurable

    def make_embedding_lookup(self, embedding: _Linear, basename: str, lm_head) -> str:
        spec, ids = embedding.spec, self.input_names["input_ids"]
        if spec is None:
            data = f"{embedding.tensor.stem}.weight"
            if self.plan.model.tie_word_embeddings:
                data = self._transposed(embedding, f"{basename}/Transpose")
            else:
                self._store(data, embedding.tensor, "weight")
            self.make_gather(f"{basename}/Gather", [data, ids], self.io_dtype, self.make_hidden_state_shape(), axis=0)
            return f"{basename}/Gather/output_0"
        parts = self._parts(embedding)
        if self.ep == "cpu":
            return self.make_row_lookup(basename, ids, spec, embedding.tensor.shape, parts)
        data, *rest = parts.values()
        flat = [embedding.out_features, embedding.in_features * spec.bits // 8]
        self.make_reshape(f"{basename}/Reshape", [data, f"/model/constants/INT64/{flat}"], dtype=ir.DataType.UINT8,
                          shape=flat)
        name = f"{basename}/GatherBlockQuantized"
        self.make_node("GatherBlockQuantized", inputs=[f"{basename}/Reshape/output_0", ids, *rest],
                       outputs=[f"{name}/output_0"], name=name, domain="com.microsoft", bits=spec.bits,
                       block_size=spec.group_size, gather_axis=0, quantize_axis=1)
        return f"{name}/output_0"

    def _transposed(self, linear: _Linear, name: str) -> str:
        """The float matrix that is stored as MatMul has it, as Gather wants it."""
        stored = f"{linear.tensor.stem}.weight_t"
        self._store(stored, linear.tensor, "weight_t")
        self.make_transpose(name, stored, self.io_dtype, shape=list(linear.tensor.shape), perm=[1, 0])
        return f"{name}/output_0"

    def make_lm_head(self, lm_head) -> None:
        if HEAD_MIX in self.plan.tensors:
            mix = _Linear(self.plan.tensors[HEAD_MIX])
            name = self.make_matmul_nbits(mix, "/lm_head/mix/MatMul", self.layernorm_attrs["output_0"])
            self.layernorm_attrs["output_0"] = f"{name}/output_0"
        super().make_lm_head(lm_head)

    # online rotations

    def _hadamard(self, name: str, root_input: str, width: int, block: int) -> str:
        """Walsh-Hadamard transform of every `block` of the last axis, `width` wide; the new value's name.

        Blocks above ONE_MATRIX go as a matrix [p, q] through one of order q from the right and of order p from the
        left, of which Sylvester's matrix of order p · q is the Kronecker product (`benchmarks/onnx_r4.py`).
        """
        left, right = hadamard_factors(block)
        inner = [width // block, *([left, right] if left > 1 else [block])]
        shape = ["batch_size", "sequence_length", *inner]
        self.make_reshape(f"{name}/Split", [root_input, f"/model/constants/INT64/{[0, 0, *inner]}"], self.io_dtype,
                          shape)
        value = f"{name}/Split/output_0"
        for side, order in (("Right", right), ("Left", left)):
            if order > 1:
                matrix = self._hadamard_matrix(order)
                inputs = [value, matrix] if side == "Right" else [matrix, value]
                value = f"{name}/{side}/output_0"
                self.make_node("MatMul", inputs=inputs, outputs=[value], name=f"{name}/{side}")
                self.make_value(value, self.io_dtype, shape=shape)
        self.make_reshape(f"{name}/Join", [value, f"/model/constants/INT64/[0, 0, {width}]"], self.io_dtype,
                          self.make_hidden_state_shape(last_dim=width))
        return f"{name}/Join/output_0"

    def _hadamard_matrix(self, order: int) -> str:
        """Name of the matrix that all layers share."""
        name = f"hadamard_{order}"
        if name not in self.stored:
            self.stored[name] = "hadamard"
            self.make_initializer(sylvester(order), name, to=self.io_dtype)
        return name

    def is_fused_rope_supported(self) -> bool:
        return self.plan.r3_block is None and super().is_fused_rope_supported()

    def make_attention_qk_rope(self, layer_id: int, **kwargs):
        caches = super().make_attention_qk_rope(layer_id, **kwargs)
        if self.plan.r3_block:
            for letter, heads in (("q", self.num_attn_heads), ("k", self.num_kv_heads)):
                self.attention_attrs[f"{letter}_path"] = self._hadamard(
                    f"/model/layers.{layer_id}/attn/{letter}_rotary/R3", self.attention_attrs[f"{letter}_path"],
                    heads * self.head_size, self.plan.r3_block)
        return caches

    # files

    def save_model(self, out_dir: str) -> None:
        path = Path(out_dir) / self.plan.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        self.model.graph.sort()
        self.stamp_build_metadata(self.model)
        ir.save(self.model, path, external_data=self.plan.data_name, size_threshold_bytes=_INLINE)


def hadamard_factors(block: int) -> tuple[int, int]:
    """Orders of the matrices that transform a block, from the left (1: none) and from the right."""
    if block <= ONE_MATRIX:
        return 1, block
    left = 1 << (block.bit_length() - 1) // 2
    return left, block // left


def sylvester(order: int) -> np.ndarray:
    """The orthogonal Walsh-Hadamard matrix [order, order], order a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (matrix / np.sqrt(order)).astype(np.float32)


def arrays(tensor: PlannedTensor, load: Callable[[str], object], dtype: str) -> dict[str, np.ndarray]:
    """The arrays in the file of a matrix, by part."""
    loaded = load(tensor.source)
    if tensor.spec is None:
        stored = loaded.astype(dtype)
        return {"weight": stored, "weight_t": stored.T}
    packed = pack(loaded)
    return {"qweight": packed["B"], "scales": packed["scales"]} | (
        {"qzeros": packed["zero_points"]} if "zero_points" in packed else {})


def _about(plan: Plan, folder: Path) -> SimpleNamespace:
    """The model as the builder's classes read it of a transformers config."""
    config = plan.model
    window = config.sliding_window
    layers = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    ids = {f"{name}_token_id": config.extra.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return SimpleNamespace(
        architectures=[plan.family.hf_class], _name_or_path=str(folder), hidden_act="silu",
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim, vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta, layer_types=layers,
        sliding_window=-1 if window is None else window, max_position_embeddings=config.max_position_embeddings, **ids)
