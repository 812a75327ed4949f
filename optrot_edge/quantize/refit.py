"""Scales fitted again once GPTQ has chosen the codes, and codes chosen again on those scales.

With the codes fixed a row's weights are linear in its stored scales (and mins), so `(Ŵ − W) H (Ŵ − W)ᵀ` has its minimum
over all of them together in closed form: one linear system per row, whose unknowns see each other through H. What is
found is rounded to stored precision and kept in the rows where the loss is lower. Zero-points and the integers of
two-level grids stay; so do MXFP4's scales, powers of two that leave nothing to choose.
"""

from __future__ import annotations

import torch

from optrot_edge.quantize.gptq import PreparedHessian, gptq
from optrot_edge.quantize.grids import Grid, GridParams

CHUNK = 2**25  # entries of all systems solved at once: 256 MiB in float64


def gptq_with_refits(weight: torch.Tensor, hessian: torch.Tensor, prepared: PreparedHessian, grid: Grid,
                     params: GridParams, refits: int) -> tuple[torch.Tensor, GridParams]:
    """GPTQ of `weight` [out, in] on H [in, in], then `refits` times: scales fitted again and, but for the last time,
    GPTQ on those. Returns every row's best codes, uint8 [out, in], and parameters, by the loss on the damped H."""
    if grid.spec.scale_dtype == "e8m0" or not refits:
        return gptq(weight, prepared, grid, params), params
    h = hessian.to(prepared.upper)
    h = h + prepared.damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
    h = h.to(weight)
    target = weight.masked_fill(prepared.dead.to(weight.device), 0.0)
    best_codes = best = best_loss = None
    for _ in range(refits):
        codes = gptq(weight, prepared, grid, params)
        params = refit(target, h, grid, codes, params)
        loss = row_losses(grid.decode(codes, params) - target, h)
        if best is None:
            best_codes, best, best_loss = codes, params, loss
        better = loss < best_loss
        best_codes, best = torch.where(better[:, None], codes, best_codes), params.where(better, best)
        best_loss = torch.where(better, loss, best_loss)
    return best_codes, best


def refit(target: torch.Tensor, hessian: torch.Tensor, grid: Grid, codes: torch.Tensor,
          params: GridParams) -> GridParams:
    """The best stored parameters for `codes` [out, in] of `target` [out, in] on `hessian` [in, in], of one dtype.

    Rows that would lose by rounding to stored precision keep what they have.
    """
    unknowns = len(slopes_of(grid, codes[:1], params.rows(slice(1)))) * codes.shape[1] // grid.spec.block_size
    step = max(1, CHUNK // unknowns**2)
    parts = []
    for first in range(0, len(target), step):
        rows = slice(first, first + step)
        parts.append(_refit_rows(target[rows], hessian, grid, codes[rows], params.rows(rows)))
    return GridParams.join(parts)


def row_losses(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """`Δ H Δᵀ` of every row [out] of `error` [out, in]."""
    return ((error @ hessian) * error).sum(1)


def slopes_of(grid: Grid, codes: torch.Tensor, params: GridParams) -> list[torch.Tensor]:
    """Derivatives of the weights by the stored scales and, where there are any, float offsets: each
    [out, blocks, block], a block being what shares them."""
    spec, rows = grid.spec, len(codes)
    groups = codes.view(rows, -1, spec.group_size).float()
    levels = groups - params.offsets[..., None] if spec.kind == "zero" else grid.levels_of(groups)
    slopes = [levels] if spec.kind != "min" else [levels, torch.ones_like(levels)]
    if spec.subscales:
        slopes[0] = slopes[0] * params.stored["subscales"][..., None]
        if len(slopes) > 1:
            slopes[1] = -slopes[1] * params.stored["suboffsets"][..., None]
    return [slope.reshape(rows, -1, spec.block_size) for slope in slopes]


def _refit_rows(target, hessian, grid, codes, params) -> GridParams:
    slopes = [slope.to(target) for slope in slopes_of(grid, codes, params)]
    rows, blocks, size = slopes[0].shape
    error = grid.decode(codes, params) - target
    pull = (error @ hessian).view(rows, blocks, size)
    right = torch.stack([(pull * slope).sum(-1) for slope in slopes], 1)
    system = torch.empty(rows, len(slopes), blocks, len(slopes), blocks, dtype=target.dtype, device=target.device)
    for i, left in enumerate(slopes):
        for block in range(blocks):
            product = (left[:, block] @ hessian[block * size:(block + 1) * size]).view(rows, blocks, size)
            for j, other in enumerate(slopes):
                system[:, i, block, j] = (product * other).sum(-1)
    change = _solve(system.view(rows, len(slopes) * blocks, -1), right.view(rows, -1)).view(right.shape)
    found = _changed(grid, params, change)
    before, after = row_losses(error, hessian), row_losses(grid.decode(codes, found) - target, hessian)
    return found.where(after < before, params)


def _solve(system: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The change [rows, n] that cancels `right`; directions that no code sees (blocks of zeros) stay."""
    home = "cpu" if system.device.type == "mps" else system.device  # Metal has no float64
    system, right = system.to(home, torch.float64), right.to(home, torch.float64)
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal += 1e-7 * diagonal + torch.where(diagonal > 0, 0.0, 1.0)
    factor, failed = torch.linalg.cholesky_ex(system)
    change = -torch.cholesky_solve(right[..., None], factor)[..., 0]
    return torch.where((failed > 0)[:, None], 0.0, change).to(torch.float32)


def _changed(grid: Grid, params: GridParams, change: torch.Tensor) -> GridParams:
    """`params` with `change` [out, 1 or 2, blocks] added to the scales and offsets, at stored precision."""
    change = change.to(params.scales.device)
    held = params.stored or {"scales": params.scales, "offsets": params.offsets}
    names = ("scales", "offsets")[:change.shape[1]]
    moved = {name: grid.store(held[name] + change[:, place]) for place, name in enumerate(names)}
    if params.stored:
        return GridParams.of_two_levels(params.stored | moved)
    return GridParams(**(held | moved))
