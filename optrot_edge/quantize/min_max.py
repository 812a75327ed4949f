"""Round-to-nearest on a grid with scales from each block's own range: cheap enough for every step of a learner.

The levels and blocks are the grid's; scales are what the range asks for, not rounded to their stored precision (nor to
MXFP4's powers of two), and K-quants' groups have float scales of their own. GPTQ's scales are searched instead, see
`optrot_edge.quantize.grids`.
"""

from __future__ import annotations

import torch

from optrot_edge.gridspec import GridSpec
from optrot_edge.quantize.grids import Grid


def block_scales(blocks: torch.Tensor, spec: GridSpec) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset [..., 1] (as `Grid.codes_of` takes them) of `blocks` [..., group].

    Affine: from the smallest to the largest entry; the others put the entry of largest magnitude on the lowest level,
    as llama.cpp's Q4_0 does. Differentiable, but for the integer zero-points.
    """
    if not spec.is_affine:
        lowest = spec.codebook[0] if spec.codebook else -(spec.levels // 2)
        return blocks.gather(-1, blocks.detach().abs().argmax(-1, keepdim=True)) / lowest, None
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    if spec.kind == "zero" or spec.subscales:
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (spec.levels - 1)
    if spec.kind == "min":
        return scale, low
    safe = torch.where(scale == 0, 1.0, scale)
    return scale, (-low / safe).detach().round().clamp(spec.lowest_zero, spec.levels - 1)


def weight_error(weight: torch.Tensor, grid: Grid, *, through_range: bool = False) -> torch.Tensor:
    """What rounding `weight` [out, in] adds to it, without a gradient.

    `through_range`: with that of the scales, the error in units of its scale held fixed.
    """
    blocks = weight.view(len(weight), -1, grid.spec.group_size)
    with torch.set_grad_enabled(through_range and torch.is_grad_enabled()):
        scale, offset = block_scales(blocks, grid.spec)
    with torch.no_grad():
        error = grid.values_of(grid.codes_of(blocks, scale, offset), scale, offset).sub_(blocks)
        if through_range:
            error.div_(torch.where(scale == 0, 1.0, scale))
    return (error * scale if through_range else error).view(weight.shape)
