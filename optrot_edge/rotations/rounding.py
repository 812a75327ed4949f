"""One layer of the rotated model as it computes once it is rounded, with gradients, in the cheaper of two bases.

Fused rotations and scales change nothing but what rounding does, so where only activations are rounded the float
model's own basis does: an input x that rounding meets as `z = x A` becomes `x + (Q(z) − z) A⁻¹`, and all else stays as
it is. No weight is rotated, and R1 costs two products with `d × d` per input. Where weights are rounded, each has to be
rotated anyway, and the whole model is computed in the rotated basis. The gradients differ in what lies off the
orthogonal group (how the function changes where `R Rᵀ ≠ I`), where no step goes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models import forward
from optrot_edge.models.activations import FLOAT, rounding_error
from optrot_edge.models.config import ModelConfig
from optrot_edge.quantize.grids import Grid
from optrot_edge.quantize.min_max import weight_error
from optrot_edge.quantize.sequential import LINEARS
from optrot_edge.rotations.fuse import READS, fold_norms, fuse_layer
from optrot_edge.rotations.rotation import Rotation


@dataclass
class Rounding:
    """What is rounded: `activations` to so many bits per token (16: not), weights on `grids` by the width of their
    rows (None: not). `through_range`: with the gradient of the steps, else straight through."""

    activations: int = FLOAT
    grids: dict[int, Grid] | None = None
    through_range: bool = False


class LayerBasis:
    """The basis in which one layer of the rotated model is rounded, a Rotation's at layer `index`.

    The rotation's tensors may require gradients. Inputs are rows [..., n], of the layer after `prepared`.
    """

    def __init__(self, rotation: Rotation, index: int, config: ModelConfig):
        self.rotation, self.index, self.config = rotation, index, config
        self.r1, self.r4_block = rotation.r1, rotation.r4_block
        self.r2 = None if rotation.r2 is None else rotation.r2[index]
        scales = {name: scale[index] for name, scale in rotation.scales.items()}
        self.scales = {"attn": scales.get("attn_norm"), "mlp": scales.get("mlp_norm"), "down": scales.get("up")}
        if "value" in scales:
            per_head = scales["value"].view(config.num_key_value_heads, -1)
            self.scales["o"] = per_head.repeat_interleave(config.query_groups, dim=0).flatten()

    def prepared(self, layer: forward.Layer) -> forward.Layer:
        """A layer of the float model with its norm gains folded, where the rotation has them apart from R1."""
        folds = self.r1 is not None or any(name in self.rotation.scales for name in READS)
        return fold_norms(layer) if folds else layer

    def enter(self, kind: str, x: torch.Tensor) -> torch.Tensor:
        """`x A`."""
        scale = self.scales.get(kind)
        if kind == "down":
            x = x if scale is None else x * scale
            return block_hadamard(x, self.r4_block) if self.r4_block else x
        x = self._rotated(kind, x)
        return x if scale is None else x * scale

    def leave(self, kind: str, error: torch.Tensor) -> torch.Tensor:
        """`error A⁻¹`."""
        scale = self.scales.get(kind)
        if kind == "down":
            error = block_hadamard(error, self.r4_block) if self.r4_block else error
            return error if scale is None else error / scale
        return self._rotated(kind, error if scale is None else error / scale, back=True)

    def _rotated(self, kind: str, x: torch.Tensor, back: bool = False) -> torch.Tensor:
        """`x R1` or, for "o", `x blockdiag(R2)`; their transposes with `back`."""
        if kind != "o":
            return x if self.r1 is None else x @ (self.r1.T if back else self.r1)
        if self.r2 is None:
            return x
        heads = x.view(*x.shape[:-1], len(self.r2), -1, self.config.head_dim)
        r2 = self.r2.mT if back else self.r2
        return torch.einsum("...hgi,hij->...hgj", heads, r2).reshape(x.shape)


def rounded_inputs(layer: forward.Layer, basis: LayerBasis, rounding: Rounding) -> forward.Layer:
    """`basis.prepared(layer)` for `forward.decoder_layer`, its inputs rounded as in the rotated layer."""
    if rounding.activations == FLOAT:
        return layer
    grad = rounding.through_range and torch.is_grad_enabled()

    def rounded(kind: str, x: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(grad):
            z = basis.enter(kind, x)
        return x + basis.leave(kind, rounding_error(z, rounding.activations, through_range=grad))

    return {**layer, "input": rounded}


def rounded_layer(layer: forward.Layer, rotation: Rotation, index: int, config: ModelConfig,
                  rounding: Rounding) -> forward.Layer:
    """The float model's `layer` for `forward.decoder_layer`, rotated, its weights and its inputs rounded."""
    grad = rounding.through_range and torch.is_grad_enabled()
    layer = fuse_layer(layer, rotation, index, config)
    for name in (f"{linear}.weight" for linear in LINEARS):
        layer[name] = layer[name] + weight_error(layer[name], rounding.grids[layer[name].shape[1]], through_range=grad)
    if rounding.activations != FLOAT:
        layer["input"] = lambda kind, x: x + rounding_error(x, rounding.activations, through_range=grad)
    return layer
