"""OptRot's objective: Σ ‖vec W̃‖₄⁴ over q, k, v, o, gate, up, down of every layer (arXiv 2512.24124).

Each matrix is written as rows `X` with loss `‖X R‖₄⁴`, so one closed-form gradient `4 Xᵀ(XR)^∘3`
serves R1 (rows of width hidden) and R2 (rows of width head_dim).
"""

from __future__ import annotations

import torch

from optrot_edge.device import widest_float
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import Layer
from optrot_edge.rotations.fuse import READS, fold_norms, rotate_values


def prepare_layer(layer: Layer, *, fold: bool, r4_block: int | None) -> Layer:
    """The layer with norms folded (when R1 will be used) and R4's fused half applied."""
    layer = fold_norms(layer) if fold else dict(layer)
    if r4_block:
        layer["down_proj.weight"] = block_hadamard(layer["down_proj.weight"], r4_block)
    return layer


def residual_rows(layer: Layer, r2: torch.Tensor | None, config: ModelConfig) -> torch.Tensor:
    """All rows [n, hidden] that R1 multiplies from the right, with R2 [kv, hd, hd] already applied."""
    if r2 is not None:
        layer = rotate_values(layer, r2, config)
    readers = [layer[f"{name}.weight"] for names in READS.values() for name in names]
    return torch.cat([*readers, layer["o_proj.weight"].T, layer["down_proj.weight"].T])


def value_rows(layer: Layer, r1: torch.Tensor | None, config: ModelConfig) -> torch.Tensor:
    """Rows [kv_heads, n, head_dim] that each KV head's R2 multiplies, with R1 already applied."""
    v, o = layer["v_proj.weight"], layer["o_proj.weight"]
    if r1 is not None:
        r1 = r1.to(v)
        v, o = v @ r1, r1.T @ o
    kv, dim = config.num_key_value_heads, config.head_dim
    values = v.view(kv, dim, -1).mT
    outputs = o.view(o.shape[0], kv, config.query_groups, dim).permute(1, 2, 0, 3).flatten(1, 2)
    return torch.cat([values, outputs], dim=1)


def fourth_power_batched(x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-problem loss [b] (float64 where the device has it) and gradient [b, d, d] of ‖X R‖₄⁴ for
    X [b, n, d], R [b, d, d]."""
    y = x @ r
    cubed = y * y * y
    return (cubed * y).sum((1, 2), dtype=widest_float(x.device)), 4 * (x.mT @ cubed)
