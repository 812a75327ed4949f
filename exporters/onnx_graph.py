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

import numpy as np
import onnx_ir as ir
import torch
from onnxruntime_genai.models.builders import LlamaModel, MistralModel, Qwen3Model, QwenModel
from onnxruntime_genai.models.builders.base import Model

from optrot_edge.exporters.folder_package import PlannedTensor
from optrot_edge.exporters.onnx_blocks import pack
from optrot_edge.exporters.onnx_lookup import RowLookup
from optrot_edge.exporters.onnx_modules import Linear, Load, Weights, describe
from optrot_edge.exporters.onnx_plan import Plan
from optrot_edge.exporters.onnx_rotations import OnlineRotations
from optrot_edge.models.family import HEAD_MIX

BUILDERS = {"llama": LlamaModel, "mistral": MistralModel, "qwen2": QwenModel, "qwen3": Qwen3Model}
_INLINE = 1024  # bytes up to which a tensor stays in the .onnx file
_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
Progress = Callable[[int, str], None]


def write_graph(plan: Plan, load: Load, folder: Path, progress: Progress) -> None:
    """Write the graph, its data and genai_config.json of `plan` into `folder`, which holds the tokenizer already.

    `load` gives the checkpoint's tensor, floats as they are stored; `progress` is told (bytes, name) of each that is
    written.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # the builder tells what it does
        graph = _class(plan.model.family)(plan, load, folder, progress)
        graph.make_model("")
        graph.save_model(str(folder))
        graph.make_genai_config(graph.about, {}, str(folder))


@cache
def _class(family: str) -> type[Model]:
    return type("Graph", (_FrozenCodes, BUILDERS[family]), {})


class _FrozenCodes(OnlineRotations, RowLookup):
    """What goes before the builder's class of a family."""

    def __init__(self, plan: Plan, load: Load, folder: Path, progress: Progress):
        self.plan, self.load, self.progress, self.about = plan, load, progress, describe(plan, folder)
        self.stored: set[str] = set()
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

    def load_weights(self, input_path: str) -> Weights:
        return Weights(self.plan, self.load)

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

    def _parts(self, linear: Linear) -> dict[str, str]:
        """Names of a packed matrix's tensors by part, in MatMulNBits' order; they are written once per source."""
        return {part: self._store(linear, part) for part in self.plan.entries(linear.tensors[0])}

    def _store(self, linear: Linear, part: str) -> str:
        """Write a part of a matrix, once; its name."""
        name = f"{linear.module}.{part}"
        if name in self.stored:
            return name
        self.stored.add(name)
        entries = [self.plan.entries(tensor)[part] for tensor in linear.tensors]

        def read() -> ir.Tensor:
            self.progress(sum(entry.nbytes for entry in entries), name)
            found = [arrays(tensor, self.load)[part] for tensor in linear.tensors]
            return ir.Tensor(np.ascontiguousarray(found[0]) if len(found) == 1 else np.concatenate(found), name=name)

        shape = ir.Shape([sum(entry.shape[0] for entry in entries), *entries[0].shape[1:]])
        self.make_initializer(ir.LazyTensor(read, dtype=ir.DataType.from_numpy(entries[0].numpy_dtype), shape=shape,
                                            name=name), name)
        return name

    def make_matmul_nbits(self, matmul, basename: str, root_input: str, **kwargs) -> str:
        if matmul.spec is None:
            name, last = basename, matmul.out_features
            inputs, attributes = [root_input, self._store(matmul, "weight_t")], {}
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
        return bool(self.plan.joined)

    def is_qkv_projection_packable(self, layer_id: int, attention) -> bool:
        return f"layers.{layer_id}.q_proj.weight" in self.plan.joined

    def make_packed_matmul(self, q_matmul: Linear, k_matmul: Linear, v_matmul: Linear, basename: str, root_input: str,
                           **kwargs) -> str:
        self.attention_attrs["k_path"] = self.attention_attrs["v_path"] = ""  # of a layer whose three stand alone
        module, tensors = self.plan.joined[q_matmul.tensors[0].source]
        return self.make_matmul(Linear(*tensors, module=module), basename, root_input, **kwargs)

    def make_embedding_lookup(self, embedding: Linear, basename: str, lm_head) -> str:
        spec, ids = embedding.spec, self.input_names["input_ids"]
        if spec is None:
            if self.plan.model.tie_word_embeddings:
                data = self._transposed(embedding, f"{basename}/Transpose")
            else:
                data = self._store(embedding, "weight")
            self.make_gather(f"{basename}/Gather", [data, ids], self.io_dtype, self.make_hidden_state_shape(), axis=0)
            return f"{basename}/Gather/output_0"
        parts = self._parts(embedding)
        if self.ep == "cpu":
            return self.make_row_lookup(basename, ids, spec, embedding.tensors[0].shape, parts)
        data, *rest = parts.values()
        flat = [embedding.out_features, embedding.in_features * spec.bits // 8]
        self.make_reshape(f"{basename}/Reshape", [data, f"/model/constants/INT64/{flat}"], dtype=ir.DataType.UINT8,
                          shape=flat)
        name = f"{basename}/GatherBlockQuantized"
        self.make_node("GatherBlockQuantized", inputs=[f"{basename}/Reshape/output_0", ids, *rest],
                       outputs=[f"{name}/output_0"], name=name, domain="com.microsoft", bits=spec.bits,
                       block_size=spec.group_size, gather_axis=0, quantize_axis=1)
        return f"{name}/output_0"

    def _transposed(self, linear: Linear, name: str) -> str:
        """The float matrix that is stored as MatMul has it, as Gather wants it."""
        self.make_transpose(name, self._store(linear, "weight_t"), self.io_dtype,
                            shape=[linear.out_features, linear.in_features], perm=[1, 0])
        return f"{name}/output_0"

    def make_lm_head(self, lm_head) -> None:
        if HEAD_MIX in self.plan.by_name:
            mix = Linear(self.plan.by_name[HEAD_MIX])
            name = self.make_matmul_nbits(mix, "/lm_head/mix/MatMul", self.layernorm_attrs["output_0"])
            self.layernorm_attrs["output_0"] = f"{name}/output_0"
        super().make_lm_head(lm_head)

    # files

    def save_model(self, out_dir: str) -> None:
        path = Path(out_dir) / self.plan.filename
        path.parent.mkdir(parents=True, exist_ok=True)
        self.model.graph.sort()
        self.stamp_build_metadata(self.model)
        ir.save(self.model, path, external_data=self.plan.data_name, size_threshold_bytes=_INLINE)


def arrays(tensor: PlannedTensor, load: Load) -> dict[str, np.ndarray]:
    """The arrays in the file of a tensor, by part."""
    loaded = load(tensor)
    if tensor.spec is None:
        return {"weight": loaded, "weight_t": loaded.T}
    packed = pack(loaded)
    return {"qweight": packed["B"], "scales": packed["scales"]} | (
        {"qzeros": packed["zero_points"]} if "zero_points" in packed else {})
