# SPDX-License-Identifier: Apache-2.0
"""mlx-lm's own Llama, Mistral, Qwen2 or Qwen3 with the rotations of optrot-edge that run on the device.

This file is copied into a package as `optrot_model.py`, where config.json names it under "model_file". mlx-lm runs it
only when told to trust it: `mlx_lm.load(path, trust_remote_code=True)`, `mlx_lm.generate --trust-remote-code`.
It needs mlx and mlx-lm alone. What there is to do, config.json says under "optrot":

* "format_version": 1.
* "r3_block": n or null. Queries and keys go through a Walsh-Hadamard transform of every n channels after RoPE, before
  the cache, which can then be quantised to fewer bits (`--kv-bits`). Scores stay as they were.
* "r4_block": n or null. So does what `mlp.down_proj` reads; its weights are stored to match.
* "head_mix": true or false. Logits are `embed_tokens.as_linear(head_mix(norm(x)))` with the linear `head_mix.weight`
  [hidden, hidden], stored [out, in] as linears are: `head_mix(x) = x @ weight.T`. Only for a tied head.

All other tensors have the names, shapes and types that mlx-lm's own model gives them.
"""

from __future__ import annotations

import importlib
from functools import cache

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

FORMAT_VERSION = 1
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # modules of mlx_lm.models


def block_hadamard(x: mx.array, block: int) -> mx.array:
    """Walsh-Hadamard transform (Sylvester's order, over √block) of every `block` channels of `x` [..., n].

    Returns x's shape and dtype. Raises ValueError unless `block` is a power of two that divides n: other sizes make
    mx.hadamard_transform read and write out of bounds.
    """
    width = x.shape[-1]
    check_block(block, width)
    # In float32: the sums before the scaling leave float16, and rounding after every stage is four times as coarse.
    blocks = mx.unflatten(x.astype(mx.float32), -1, (width // block, block))
    return mx.flatten(mx.hadamard_transform(blocks, scale=block**-0.5), -2, -1).astype(x.dtype)


def check_block(block: int, width: int) -> None:
    """Raise ValueError unless `block` is a power of two that divides `width`."""
    if not isinstance(block, int) or block < 2 or block & (block - 1) or width % block:
        raise ValueError(f"a block of {block} channels is no power of two that divides {width}")


class RotatedRope(nn.Module):
    """RoPE, then R3: attention calls it for queries and keys, before it gives the keys to the cache."""

    def __init__(self, rope: nn.Module, block: int):
        super().__init__()
        self.rope, self.block = rope, block

    def __call__(self, x: mx.array, *args, **kwargs) -> mx.array:
        return block_hadamard(self.rope(x, *args, **kwargs), self.block)


class RotatedMLP(nn.Module):
    """The linears of mlx-lm's MLP under their own names, with R4 before the last."""

    def __init__(self, mlp: nn.Module, block: int):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.block = block

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(block_hadamard(swiglu(self.gate_proj(x), self.up_proj(x)), self.block))


class Rotations:
    """What goes before mlx-lm's `Model` of an architecture; see `model_class`."""

    def __init__(self, args):
        super().__init__(args)
        r3_block, r4_block = args.optrot.get("r3_block"), args.optrot.get("r4_block")
        for layer in self.layers:
            if r3_block is not None:
                check_block(r3_block, getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads)
                layer.self_attn.rope = RotatedRope(layer.self_attn.rope, r3_block)
            if r4_block is not None:
                check_block(r4_block, args.intermediate_size)
                layer.mlp = RotatedMLP(layer.mlp, r4_block)
        if args.optrot.get("head_mix"):
            self.head_mix = nn.Linear(args.hidden_size, args.hidden_size, bias=False)

    def __call__(self, inputs: mx.array, cache=None, input_embeddings: mx.array | None = None) -> mx.array:
        if "head_mix" not in self:
            return super().__call__(inputs, cache, input_embeddings)
        return self.model.embed_tokens.as_linear(self.head_mix(self.model(inputs, cache, input_embeddings)))


def architecture(model_type: str):
    """mlx-lm's module of a config's `model_type`; ValueError for one that is not known here."""
    if model_type not in ARCHITECTURES:
        raise ValueError(f"model_type {model_type!r}: this model file is for {', '.join(ARCHITECTURES)}")
    return importlib.import_module(f"mlx_lm.models.{ARCHITECTURES[model_type]}")


@cache
def model_class(model_type: str) -> type[nn.Module]:
    """mlx-lm's `Model` of that type with `Rotations` in it."""
    return type("Model", (Rotations, architecture(model_type).Model), {})


class ModelArgs:
    """Stands for mlx-lm's class of that name, of whichever architecture config.json asks for."""

    @classmethod
    def from_dict(cls, config: dict):
        """mlx-lm's arguments for `config`, with its "optrot" besides; ValueError where that cannot be done."""
        args = architecture(config["model_type"]).ModelArgs.from_dict(config)
        args.optrot = config.get("optrot")
        if not isinstance(args.optrot, dict):
            raise ValueError('config.json says nothing under "optrot"; this model file is for packages of optrot-edge')
        if (version := args.optrot.get("format_version")) != FORMAT_VERSION:
            raise ValueError(f"this package has optrot format_version {version}, and its model file knows only "
                             f"{FORMAT_VERSION}: upgrade optrot-edge and export the package again, or replace "
                             "optrot_model.py by that of the version that wrote config.json")
        if args.optrot.get("head_mix") and not args.tie_word_embeddings:
            raise ValueError('config.json sets head_mix under "optrot", but not tie_word_embeddings')
        return args


def Model(args) -> nn.Module:
    """The model of `ModelArgs.from_dict`; ValueError for blocks that do not fit it."""
    return model_class(args.model_type)(args)
