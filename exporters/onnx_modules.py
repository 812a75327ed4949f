"""A checkpoint as onnxruntime-genai's model builder walks over a model: modules with weights, and a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from optrot_edge.checkpoint import QuantizedTensor
from optrot_edge.exporters.folder_package import PlannedTensor
from optrot_edge.exporters.onnx_plan import Plan

Load = Callable[[PlannedTensor], QuantizedTensor | np.ndarray]


class Linear:
    """A matrix as the builder's methods look at it, or several of one grid and width on top of each other, then with a
    `module` of its own. Those of one module share their tensors in the file."""

    def __init__(self, *tensors: PlannedTensor, bias: torch.Tensor | None = None, module: str | None = None):
        tensor, self.tensors, self.bias, self.g_idx = tensors[0], tensors, bias, None
        self.module = module or tensor.module
        self.out_features, self.in_features = sum(each.shape[0] for each in tensors), tensor.shape[1]
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


class Weights:
    """What the builder walks over."""

    def __init__(self, plan: Plan, load: Load):
        self.plan, self.load = plan, load
        self.embedding = SimpleNamespace(weight=Linear(plan.by_name["embed_tokens.weight"]))
        self.final_norm = self._get("norm")
        self.lm_head = Linear(plan.by_name[plan.head])

    def _get(self, stem: str):
        tensor, bias = (self.plan.by_name.get(f"{stem}.{kind}") for kind in ("weight", "bias"))
        if tensor is None:
            return None
        if len(tensor.shape) == 1:
            return _Gain(torch.from_numpy(self.load(tensor)))
        return Linear(tensor, bias=None if bias is None else torch.from_numpy(self.load(bias)))

    def modules(self):
        """Embedding, layers, final norm, head."""
        yield self.embedding
        for index in range(self.plan.model.num_hidden_layers):
            yield _DecoderLayer(lambda stem, index=index: self._get(f"layers.{index}.{stem}"))
        yield self.final_norm
        yield self.lm_head


def describe(plan: Plan, folder: Path) -> SimpleNamespace:
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
