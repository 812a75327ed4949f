"""The decoder in plain torch, cut into the stages that sequential quantisation needs.

A layer is a dict of tensors under canonical names (Hugging Face's own, without prefix):
`attn_norm.weight`, `{q,k,v,o}_proj.weight` [+ `.bias`], `q_norm.weight`, `k_norm.weight`,
`mlp_norm.weight`, `{gate,up,down}_proj.weight` [+ `.bias`]. Linears are `[out, in]`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models.activations import FLOAT, InputQuantizer
from optrot_edge.models.config import ModelConfig

Layer = dict[str, torch.Tensor]


def linear(x: torch.Tensor, layer: Layer, name: str) -> torch.Tensor:
    """`x Wᵀ + b` with the layer's `name.weight` and, when there is one, `name.bias`.

    A callable under the layer's key `tap` is given (name, x, output) and returns what is passed on.
    """
    y = F.linear(x, layer[f"{name}.weight"], layer.get(f"{name}.bias"))
    tap = layer.get("tap")
    return y if tap is None else tap(name, x, y)


def linear_input(kind: str, x: torch.Tensor, layer: Layer) -> torch.Tensor:
    """What the linears of `kind` ("attn": q, k and v, "o", "mlp": gate and up, "down") read: `x`, or what a callable
    under the layer's key `input`, given (kind, x), makes of it."""
    change = layer.get("input")
    return x if change is None else change(kind, x)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last axis (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_tables(config: ModelConfig, length: int, *, dtype=torch.float32, device="cpu"):
    """cos and sin, each [length, head_dim], in the half-split convention of transformers."""
    inv_freq = torch.tensor(config.rope_inv_freq(), dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inv_freq)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `x` [..., length, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def attention_context(x: torch.Tensor, layer: Layer, config: ModelConfig, rope, *,
                      r3_block: int | None = None) -> torch.Tensor:
    """Normed input [batch, length, hidden] to what `o_proj` reads [batch, length, heads * head_dim].

    `r3_block` applies the online rotation R3 to queries and keys after RoPE.
    """
    batch, length, _ = x.shape
    x = linear_input("attn", x, layer)

    def heads(name: str, count: int) -> torch.Tensor:
        y = linear(x, layer, f"{name}_proj").view(batch, length, count, config.head_dim)
        if f"{name}_norm.weight" in layer:
            y = rms_norm(y, layer[f"{name}_norm.weight"], config.rms_norm_eps)
        return y.transpose(1, 2)

    q = apply_rope(heads("q", config.num_attention_heads), *rope)
    k = apply_rope(heads("k", config.num_key_value_heads), *rope)
    v = heads("v", config.num_key_value_heads)
    if r3_block:
        q, k = block_hadamard(q, r3_block), block_hadamard(k, r3_block)
    k = k.repeat_interleave(config.query_groups, dim=1)
    v = v.repeat_interleave(config.query_groups, dim=1)
    window = config.sliding_window
    if window is None or window >= length:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        distance = torch.arange(length, device=x.device)
        distance = distance[:, None] - distance[None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < window))
    return y.transpose(1, 2).reshape(batch, length, -1)


def mlp_hidden(x: torch.Tensor, layer: Layer, *, r4_block: int | None = None) -> torch.Tensor:
    """Normed input [..., hidden] to what `down_proj` reads [..., intermediate] (SwiGLU, then R4)."""
    x = linear_input("mlp", x, layer)
    y = F.silu(linear(x, layer, "gate_proj")) * linear(x, layer, "up_proj")
    return block_hadamard(y, r4_block) if r4_block else y


def decoder_layer(x: torch.Tensor, layer: Layer, config: ModelConfig, rope, *,
                  r3_block: int | None = None, r4_block: int | None = None) -> torch.Tensor:
    """One pre-norm decoder layer on the residual stream [batch, length, hidden]."""
    normed = rms_norm(x, layer["attn_norm.weight"], config.rms_norm_eps)
    context = attention_context(normed, layer, config, rope, r3_block=r3_block)
    x = x + linear(linear_input("o", context, layer), layer, "o_proj")
    normed = rms_norm(x, layer["mlp_norm.weight"], config.rms_norm_eps)
    hidden = mlp_hidden(normed, layer, r4_block=r4_block)
    return x + linear(linear_input("down", hidden, layer), layer, "down_proj")


def head_mix(model, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
    """The linear [hidden, hidden] through which the model's head is tied to its embedding; mostly None."""
    mix = getattr(model, "head_mix", None)
    return None if mix is None else mix(dtype)


def head_input(x: torch.Tensor, norm: torch.Tensor, mix: torch.Tensor | None, eps: float) -> torch.Tensor:
    """What the head reads of the residual stream [..., hidden]: normed, then through `mix` (see `head_mix`)."""
    x = rms_norm(x, norm, eps)
    return x if mix is None else F.linear(x, mix)


@torch.no_grad()
def logits(model, tokens: torch.Tensor, *, dtype=torch.float32, device="cpu", batch_size: int = 8,
           activations: int = FLOAT):
    """Logits [batch, length, vocab] of `tokens` [batch, length], layers read one at a time.

    `model` is anything with `config`, `embedding(dtype)`, `layer(i, dtype)`, `final_norm(dtype)`,
    `lm_head(dtype)` (None when tied) and optionally `r3_block`, `r4_block`, `head_mix(dtype)`: a checkpoint
    reader, a rotated view of one, or a decoded quantised checkpoint. `activations`: bits per entry that the inputs of
    the layers' linears are rounded to, see `optrot_edge.models.activations`, after R4 and, if the model has
    `input_transforms(index, dtype)`, under those; 16: not at all.
    """
    hidden = final_hidden(model, tokens, dtype=dtype, device=device, batch_size=batch_size, activations=activations)
    head = model.lm_head(dtype)
    head = (model.embedding(dtype) if head is None else head).to(device)
    return torch.cat([F.linear(part.to(device), head) for part in hidden.split(batch_size)])


@torch.no_grad()
def final_hidden(model, tokens: torch.Tensor, *, dtype=torch.float32, device="cpu", batch_size: int = 8,
                 activations: int = FLOAT):
    """What the head reads, [batch, length, hidden]; see `logits` for what `model` must offer."""
    config = model.config
    rope = rope_tables(config, tokens.shape[1], dtype=dtype, device=device)
    x = F.embedding(tokens, model.embedding(dtype))
    r3, r4 = getattr(model, "r3_block", None), getattr(model, "r4_block", None)
    for index in range(config.num_hidden_layers):
        layer = {key: value.to(device) for key, value in model.layer(index, dtype).items()}
        if activations != FLOAT:
            transforms = model.input_transforms(index, dtype) if hasattr(model, "input_transforms") else None
            layer["input"] = InputQuantizer(activations, transforms)
        for part in x.split(batch_size):  # written in place: one stream in memory
            part.copy_(decoder_layer(part.to(device), layer, config, rope, r3_block=r3, r4_block=r4))
    return head_input(x, model.final_norm(dtype), head_mix(model, dtype), config.rms_norm_eps)
