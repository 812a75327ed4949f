"""GPTQ's plain loop, the yardstick of the timings: one column at a time within blocks, as in the paper's algorithm."""

from __future__ import annotations

import torch

from optrot_edge.quantize.gptq import PreparedHessian
from optrot_edge.quantize.grids import Grid, GridParams


@torch.no_grad()
def plain_gptq(weight: torch.Tensor, prepared: PreparedHessian, grid: Grid, params: GridParams, *,
               dtype: torch.dtype = torch.float64, block: int = 128) -> torch.Tensor:
    """What `quantize.gptq.gptq` computes, uint8 [out, in], by the grid's own functions and no kernel, in `dtype`."""
    upper, order = prepared.upper.to(dtype), prepared.order
    residual = weight.to(upper).T[order].contiguous()
    residual[prepared.dead[order]] = 0
    scales, offsets = (None if part is None else part.to(upper) for part in params.columns())
    group = (order // grid.spec.group_size).tolist()
    codes = torch.empty(residual.shape, dtype=torch.uint8, device=upper.device)
    columns = len(residual)
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.zeros_like(residual[first:last])
        corner = upper[first:last, first:last]
        for j in range(last - first):
            w = residual[first + j]
            if j:
                w = torch.addmv(w, errors[:j].T, corner[:j, j], alpha=-1)
            scale = scales[group[first + j]]
            offset = None if offsets is None else offsets[group[first + j]]
            q = grid.codes_of(w, scale, offset)
            codes[first + j] = q
            errors[j] = (w - grid.values_of(q, scale, offset)) / corner[j, j]
        if last < columns:
            residual[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    unordered = torch.empty_like(codes)
    unordered[order] = codes
    return unordered.T.contiguous()
