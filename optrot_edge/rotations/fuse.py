"""Fuse R1, R2, R4's weight half, norm gains and channel scales into the weights: the function is unchanged.

Conventions: a linear is `[out, in]`, a residual vector is a row `x`, and `x' = x R1`
(OptRot, arXiv 2512.24124, section 2; QuaRot, arXiv 2404.00456, section 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from optrot_edge.device import widest_float
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.memory import CHUNK
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import Layer
from optrot_edge.rotations.rotation import Rotation

READS = {"attn_norm": ("q_proj", "k_proj", "v_proj"), "mlp_norm": ("gate_proj", "up_proj")}
WRITES = ("o_proj", "down_proj")


def fold_norms(layer: Layer) -> Layer:
    """`W ← W·diag(γ)` for every linear that reads a norm's output; the gains become 1."""
    layer = dict(layer)
    for norm, readers in READS.items():
        gain = layer[f"{norm}.weight"]
        for name in readers:
            layer[f"{name}.weight"] = layer[f"{name}.weight"] * gain
        layer[f"{norm}.weight"] = torch.ones_like(gain)
    return layer


def rotate_values(layer: Layer, r2: torch.Tensor, config: ModelConfig) -> Layer:
    """Per KV head: `W_v ← R2ᵀ W_v`, `b_v ← b_v R2`, and `W_o ← W_o R2` for the heads that share it.

    `r2` is [kv_heads, head_dim, head_dim].
    """
    layer = dict(layer)
    kv, dim = config.num_key_value_heads, config.head_dim
    r2 = r2.to(layer["v_proj.weight"])
    v = layer["v_proj.weight"].view(kv, dim, -1)
    layer["v_proj.weight"] = (r2.mT @ v).flatten(0, 1)
    if "v_proj.bias" in layer:
        layer["v_proj.bias"] = (layer["v_proj.bias"].view(kv, 1, dim) @ r2).flatten()
    o = layer["o_proj.weight"]
    heads = o.view(o.shape[0], kv, config.query_groups, dim)
    layer["o_proj.weight"] = torch.einsum("ohgi,hij->ohgj", heads, r2).reshape(o.shape)
    return layer


def rotate_residual(layer: Layer, r1: torch.Tensor) -> Layer:
    """R1 on a layer whose norms are folded: readers `W R1`, writers `R1ᵀ W`, their biases `b R1`."""
    layer = dict(layer)
    r1 = r1.to(layer["q_proj.weight"])
    for name in (*READS["attn_norm"], *READS["mlp_norm"]):
        layer[f"{name}.weight"] = layer[f"{name}.weight"] @ r1
    for name in WRITES:
        layer[f"{name}.weight"] = r1.T @ layer[f"{name}.weight"]
        if f"{name}.bias" in layer:
            layer[f"{name}.bias"] = layer[f"{name}.bias"] @ r1
    return layer


def scale_gain(layer: Layer, norm: str, gain: torch.Tensor) -> Layer:
    """The layer with `gain` [hidden] as gain of `norm`; the linears that read it make up for it."""
    layer = dict(layer)
    change = layer[f"{norm}.weight"] / gain.to(layer[f"{norm}.weight"])
    for name in READS[norm]:
        layer[f"{name}.weight"] = layer[f"{name}.weight"] * change
    layer[f"{norm}.weight"] = gain.to(change)
    return layer


def scale_between(layer: Layer, writer: str, reader: str, scale: torch.Tensor, repeat: int = 1) -> Layer:
    """Rows (and bias) of `writer` times `scale` [n], columns of `reader` divided by it.

    With `repeat`, each channel of the writer is read by that many query heads: `scale` is [kv_heads, dim].
    """
    layer = dict(layer)
    scale = scale.to(layer[f"{writer}.weight"])
    layer[f"{writer}.weight"] = layer[f"{writer}.weight"] * scale.reshape(-1, 1)
    if f"{writer}.bias" in layer:
        layer[f"{writer}.bias"] = layer[f"{writer}.bias"] * scale.flatten()
    columns = scale.repeat_interleave(repeat, dim=0).flatten()
    layer[f"{reader}.weight"] = layer[f"{reader}.weight"] / columns
    return layer


def fuse_layer(layer: Layer, rotation: Rotation, index: int, config: ModelConfig) -> Layer:
    """The rotated layer in the dtype of `layer`. Norm gains are folded only when R1 asks for it."""
    scales = {name: scale[index] for name, scale in rotation.scales.items()}
    if rotation.r2 is not None:
        layer = rotate_values(layer, rotation.r2[index], config)
    if "value" in scales:
        per_head = scales["value"].view(config.num_key_value_heads, -1)
        layer = scale_between(layer, "v_proj", "o_proj", per_head, config.query_groups)
    if "up" in scales:
        layer = scale_between(layer, "up_proj", "down_proj", scales["up"])
    if rotation.r4_block:
        layer = {**layer, "down_proj.weight": block_hadamard(layer["down_proj.weight"], rotation.r4_block)}
    if rotation.r1 is not None:
        layer = rotate_residual(fold_norms(layer), rotation.r1)
    for norm in READS:
        if norm in scales:
            layer = scale_gain(layer, norm, scales[norm])
    return layer


def runs_head_mix(applied: Iterable[str], format: str | None) -> bool:
    """Whether what runs packages of `format` under the rotations `applied` can run a tied head's `head_mix` too.

    An ONNX graph always can, a graph or a model file of the package's own for R3 or R4 too; llama.cpp, to whose graph
    R4 is all that can be added, cannot.
    """
    online = {"r3", "r4"}.intersection(applied)
    return format == "onnx" or bool(online - {"r4"} if format == "gguf" else online)


def packaged(source, rotation: Rotation, format: str | None = None, device: str = "cpu") -> RotatedModel:
    """`source` under `rotation` as packages of `format` have it."""
    return RotatedModel(source, rotation, device, keep_tied=runs_head_mix(rotation.applied, format))


class RotatedModel:
    """A checkpoint reader seen through a rotation; tensors are fused in float64 when read.

    Same interface as the reader (see `optrot_edge.models.forward.logits`). R1 with a non-constant
    final gain unties `lm_head` from the embedding: `config.tie_word_embeddings` tells. With `keep_tied` it stays
    tied, through `head_mix`: `config.head_mix` tells. That takes a graph of one's own to run.
    """

    def __init__(self, source, rotation: Rotation, device: str = "cpu", *, keep_tied: bool = False):
        rotation.validate(source.config)
        self.source, self.rotation = source, rotation
        self.device = device
        self.compute = widest_float(device)
        self.r3_block, self.r4_block = rotation.r3_block, rotation.r4_block
        self.folds_head = False
        tied = source.config.tie_word_embeddings
        if rotation.r1 is not None:
            gain = source.final_norm(torch.float64)
            self.folds_head = not tied or bool((gain != gain[0]).any())
        mixes = keep_tied and tied and self.folds_head
        self.config = dataclasses.replace(source.config, tie_word_embeddings=tied and (mixes or not self.folds_head),
                                          head_mix=mixes)

    def layer(self, index: int, dtype: torch.dtype = torch.float32) -> Layer:
        """Decoder layer `index`, rotated."""
        if not self.rotation.changes:
            return self.source.layer(index, dtype)
        layer = {k: v.to(self.device) for k, v in self.source.layer(index, self.compute).items()}
        layer = fuse_layer(layer, self.rotation, index, self.source.config)
        return {name: tensor.to("cpu", dtype) for name, tensor in layer.items()}

    def _to_residual(self, weight: torch.Tensor, dtype: torch.dtype, gain=None) -> torch.Tensor:
        """`weight · diag(gain) · R1`, in row chunks so that one float64 copy of all is never held."""
        if self.rotation.r1 is None:
            return weight.to(dtype)
        r1 = self.rotation.r1.to(self.device, self.compute)
        if gain is not None:
            r1 = gain.to(r1)[:, None] * r1
        out = torch.empty(weight.shape, dtype=dtype)
        for rows, target in zip(weight.split(CHUNK), out.split(CHUNK), strict=True):
            target.copy_(rows.to(r1) @ r1)
        return out

    def chunks(self, name: str, dtype: torch.dtype = torch.float32):
        """Rows of "embed_tokens.weight" or (untied) "lm_head.weight" in the rotated basis, CHUNK at a time: together
        they are `embedding` or `lm_head`, to the bit."""
        native = torch.float64 if dtype == torch.float64 else torch.float32
        folded = name == "lm_head.weight" and self.folds_head and self.rotation.r1 is not None
        gain = self.source.final_norm(torch.float64) if folded else None
        vocab = self.config.vocab_size
        for start in range(0, vocab, CHUNK):
            yield self._to_residual(self.source.rows(name, start, min(start + CHUNK, vocab), native), dtype, gain)

    def embedding(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Token embedding [vocab, hidden] in the rotated basis."""
        native = torch.float64 if dtype == torch.float64 else torch.float32
        return self._to_residual(self.source.embedding(native), dtype)

    def final_norm(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Final norm gain [hidden]; ones once it is folded into the head, or into `head_mix`."""
        gain = self.source.final_norm(dtype)
        return torch.ones_like(gain) if self.folds_head else gain

    def head_mix(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """The linear `M = R1ᵀ diag(γ) R1` [hidden, hidden] between the final norm and a head that is kept tied, else
        None: `(x R1) M (E R1)ᵀ = x diag(γ) Eᵀ`."""
        if not self.config.head_mix:
            return None
        r1 = self.rotation.r1.to(self.device, self.compute)
        gain = self.source.final_norm(torch.float64).to(r1)
        return ((r1.T * gain) @ r1).T.to("cpu", dtype)  # transposed (if symmetric): linears are [out, in]

    def lm_head(self, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """Output projection [vocab, hidden] in the rotated basis, or None when (still) tied."""
        if self.config.tie_word_embeddings:
            return None
        native = torch.float64 if dtype == torch.float64 else torch.float32
        head = self.source.lm_head(native)
        head = self.source.embedding(native) if head is None else head
        gain = self.source.final_norm(torch.float64) if self.folds_head else None
        return self._to_residual(head, dtype, gain)
