"""Grids that formats store: fit scales once at stored precision, freeze them, then round to codes.

`fit` is a weighted least-squares search in the manner of llama.cpp's imatrix quantisers: weight
`a = h·√(σ² + w²)` per element, h the importance of its input column, σ² four times the row's mean
square (measured against 0.5, 1 and ∞ of it: flat within 1 % of GPTQ's held-out loss); for
each candidate step the best scale (and offset) has a closed form, and the winner is polished by
alternating rounding and least squares before its scale is rounded to the stored precision.
Codebooks are searched in `codebooks`, grids of two levels in `kquants`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from optrot_edge.checkpoint import GridSpec, QuantizedTensor, grid_spec
from optrot_edge.device import widest_float
from optrot_edge.errors import InputError
from optrot_edge.gridspec import encode_scales
from optrot_edge.quantize.codebooks import Codebook
from optrot_edge.quantize.kquants import fit_super_blocks
from optrot_edge.quantize.numerics import within_range

CPU_CHUNK = 2**12  # blocks of 32 searched at once: keeps a few temporaries of 512 KiB inside the cache
GPU_CHUNK = 2**18  # enough work for every launch, at 32 MiB per temporary
POLISH = 3  # rounds of alternating least squares after the search


@dataclass
class GridParams:
    """Frozen parameters: scales and offsets [out, groups], float32 holding what the stored values decode to.

    `offsets` is None ("symmetric", "codebook"), float mins ("min") or integer zero-points ("zero"). `stored` has what
    grids of two levels keep instead: scales, offsets [out, in / 256] and integer subscales, suboffsets [out, groups].
    """

    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    stored: dict[str, torch.Tensor] = field(default_factory=dict)

    def columns(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Transposed copies [groups, out] in float64, as the column-by-column quantiser reads them."""
        dtype = widest_float(self.scales.device)
        turn = lambda t: None if t is None else t.T.to(dtype).contiguous()  # noqa: E731
        return turn(self.scales), turn(self.offsets)

    def rows(self, rows: slice) -> GridParams:
        """The parameters of some rows."""
        return GridParams(self.scales[rows], None if self.offsets is None else self.offsets[rows],
                          {name: part[rows] for name, part in self.stored.items()})

    def where(self, chosen: torch.Tensor, other: GridParams) -> GridParams:
        """These parameters in the `chosen` [out] rows, `other`'s in the rest."""
        pick = lambda a, b: None if a is None else torch.where(chosen[:, None], a, b)  # noqa: E731
        return GridParams(pick(self.scales, other.scales), pick(self.offsets, other.offsets),
                          {name: pick(part, other.stored[name]) for name, part in self.stored.items()})

    @classmethod
    def join(cls, parts: list[GridParams]) -> GridParams:
        """Row chunks put together again."""
        offsets = None if parts[0].offsets is None else torch.cat([part.offsets for part in parts])
        return cls(torch.cat([part.scales for part in parts]), offsets,
                   {name: torch.cat([part.stored[name] for part in parts]) for name in parts[0].stored})

    @classmethod
    def of_two_levels(cls, stored: dict[str, torch.Tensor]) -> GridParams:
        """Decoded parameters of `stored` (float32), exactly: a float16 times an integer fits float32."""
        def expand(name: str) -> torch.Tensor:
            integers = stored[f"sub{name}"]
            repeats = integers.shape[1] // stored[name].shape[1]
            return stored[name].repeat_interleave(repeats, 1) * integers

        return cls(expand("scales"), -expand("offsets") if "offsets" in stored else None, stored)


class Grid:
    """One storable grid; see GridSpec for its levels."""

    def __init__(self, spec: GridSpec | str, *, mins_below_zero: bool = False):
        """`mins_below_zero`: `fit` finds no min above zero, as K-quants cannot store one."""
        self.spec = grid_spec(spec) if isinstance(spec, str) else spec
        self.mins_below_zero = mins_below_zero
        self.top = self.spec.levels - 1
        self.codebook = Codebook(self.spec.codebook) if self.spec.codebook else None
        self.center = self.codebook.center if self.codebook else self.spec.levels // 2

    def check_width(self, columns: int, name: str = "weight") -> None:
        """InputError unless rows of `columns` weights divide into blocks."""
        if columns % self.spec.block_size:
            raise InputError(f"{name}: rows of {columns} weights do not divide into groups of "
                             f"{self.spec.block_size} ({self.spec.name}); choose another type or group size")

    def codes_of(self, w, scale, offset) -> torch.Tensor:
        """Nearest codes (as floats) of `w` under broadcast scale and offset; scale 0 gives value 0."""
        if self.codebook:
            safe = torch.where(scale == 0, torch.ones_like(scale), scale)
            return torch.where(scale == 0, float(self.center), self.codebook.nearest(w / safe))
        # Over infinity every weight is 0 steps from the neutral code; no second pass has to put that in.
        divisor = torch.where(scale == 0, torch.inf, scale)
        if self.spec.kind == "min":
            codes = (w - offset).div_(divisor).add_(torch.where(scale == 0, float(self.center), 0.0))
        else:
            codes = (w / divisor).add_(self.center if self.spec.kind == "symmetric" else offset)
        return codes.round_().clamp_(0, self.top)

    def values_of(self, codes, scale, offset) -> torch.Tensor:
        """Decode (float) codes under broadcast scale and offset."""
        if self.codebook:
            return self.codebook.levels_of(codes) * scale
        if self.spec.kind == "min":
            return codes * scale + offset
        return (codes - (self.center if self.spec.kind == "symmetric" else offset)) * scale

    def round(self, weight: torch.Tensor, params: GridParams) -> torch.Tensor:
        """Round-to-nearest codes, uint8 [out, in]."""
        blocks = weight.view(weight.shape[0], -1, self.spec.group_size)
        scale, offset = self._per_block(params, blocks.dtype)
        return self.codes_of(blocks, scale, offset).to(torch.uint8).view(weight.shape)

    def decode(self, codes: torch.Tensor, params: GridParams) -> torch.Tensor:
        """float32 weights [out, in] of uint8 codes."""
        blocks = codes.view(codes.shape[0], -1, self.spec.group_size).float()
        scale, offset = self._per_block(params, torch.float32)
        return self.values_of(blocks, scale, offset).view(codes.shape)

    @staticmethod
    def _per_block(params: GridParams, dtype):
        offset = None if params.offsets is None else params.offsets[..., None].to(dtype)
        return params.scales[..., None].to(dtype), offset

    def pack(self, codes: torch.Tensor, params: GridParams) -> QuantizedTensor:
        """The checkpoint's tensor: numpy codes and parameters in their stored dtypes."""
        spec = self.spec
        parts = params.stored or {"scales": params.scales, "offsets": params.offsets}
        parts = {name: part.cpu().numpy() for name, part in parts.items() if part is not None}
        for name, part in parts.items():
            if name.startswith("sub"):
                parts[name] = part.astype(spec.subscale_dtype)
            elif name == "offsets" and spec.kind == "zero":
                parts[name] = part.astype("uint8")
            else:
                parts[name] = encode_scales(part, spec.scale_dtype)
        return QuantizedTensor(spec, codes.cpu().numpy(), **parts)

    def fit(self, weight: torch.Tensor, importance: torch.Tensor | None = None) -> GridParams:
        """Weighted least-squares parameters for `weight` [out, in]; `importance` [in] ≥ 0 or None.

        Raises InputError for weights or an importance out of range, and when a scale does not fit its stored precision.
        """
        weight = weight.float()
        if not weight.isfinite().all():
            raise InputError("the weights hold NaN or infinity; the model is damaged")
        importance = None if importance is None else within_range(importance)
        rows, columns = weight.shape
        self.check_width(columns)
        spread = weight.square().mean(1, keepdim=True)
        chunk = CPU_CHUNK if weight.device.type == "cpu" else GPU_CHUNK
        step, parts = max(1, chunk * 32 // columns), []
        for first in range(0, rows, step):
            part = weight[first:first + step]
            a = (4 * spread[first:first + step] + part.square()).sqrt()
            if importance is not None:
                a = a * importance.to(a)
            parts.append(self._fit_rows(part, a))
        params = GridParams.join(parts)
        if not params.scales.isfinite().all() or (params.offsets is not None and not params.offsets.isfinite().all()):
            raise InputError(f"the scales of {self.spec.name} overflow {self.spec.scale_dtype}; "
                             "are the weights damaged?")
        return params

    def _fit_rows(self, part: torch.Tensor, a: torch.Tensor) -> GridParams:
        rows, group = len(part), self.spec.group_size
        blocks, a = part.reshape(-1, group), a.reshape(-1, group)
        if self.spec.subscales:
            stored = fit_super_blocks(self, blocks, a)
            return GridParams.of_two_levels({name: value.view(rows, -1) for name, value in stored.items()})
        scale, offset = self.search(blocks, a)
        return GridParams(scale.view(rows, -1), None if offset is None else offset.view(rows, -1))

    def search(self, blocks: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Best scale and offset [n] at stored precision of `blocks` [n, group] under weights `a`."""
        if self.spec.scale_dtype == "e8m0":
            return self.codebook.search_exponent(blocks, a, self.loss), None
        if self.codebook:
            return self._polish(blocks, a, self.codebook.search(blocks, a), None)
        return (self._search_affine if self.spec.is_affine else self._search_symmetric)(blocks, a)

    def levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """What the scale multiplies: codes ("min"), codes around the centre, or the codebook's levels."""
        if self.codebook:
            return self.codebook.levels_of(codes)
        return codes if self.spec.is_affine else codes - self.center

    def store(self, value: torch.Tensor) -> torch.Tensor:
        """`value` rounded to the stored precision, as float32."""
        return value if self.spec.scale_dtype == "float32" else value.to(getattr(torch, self.spec.scale_dtype)).float()

    def loss(self, blocks, a, scale, offset) -> torch.Tensor:
        """Weighted squared error per block and the codes it was measured with."""
        offset = None if offset is None else offset[:, None]
        codes = self.codes_of(blocks, scale[:, None], offset)
        error = self.values_of(codes, scale[:, None], offset).sub_(blocks).square_().mul_(a).sum(1)
        return error, codes

    def _search_symmetric(self, blocks, a):
        """Candidates put the entry of largest magnitude on or near either end of the level range."""
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
        best_gain = torch.full_like(extreme, -1.0)
        best = torch.zeros_like(extreme)
        aw = a * blocks
        span = float(self.center)
        shifts = [0.1 * k for k in range(-9, 10)] if self.spec.bits < 8 else [0.0]
        ends = [-(span + s) for s in shifts] + [span - 1 + s for s in shifts[4::2]]
        for end in ends:
            inverse = torch.where(extreme == 0, 0.0, end / extreme)
            q = (blocks * inverse[:, None]).round_().clamp_(-span, span - 1)
            cross, square = (aw * q).sum(1), (a * q).mul_(q).sum(1)
            gain = torch.where(square > 0, cross * cross / square, 0.0)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, torch.where(square > 0, cross / square, 0.0), best)
        return self._polish(blocks, a, best, None)

    def _search_affine(self, blocks, a):
        """Candidates shrink or stretch the block's range about its lower end; LS fixes the rest."""
        low, high = blocks.amin(1), blocks.amax(1)
        if self.spec.kind == "zero" or self.mins_below_zero:
            low, high = low.clamp_max(0), high.clamp_min(0)
        span = high - low
        scale, offset = self._finish(span / self.top, low)
        best_loss, _ = self.loss(blocks, a, scale, offset)
        sums = a.sum(1), (a * blocks).sum(1)
        shifts = [-0.9 + 0.15 * k for k in range(21)] if self.spec.bits < 8 else [0.0]
        for shift in shifts:
            step = span / (self.top + shift)
            codes = self.codes_of(blocks, step[:, None], self._as_offset(step, low)[:, None])
            new_scale, new_offset = self._finish(*self._least_squares(blocks, a, codes, sums, step, low))
            loss, _ = self.loss(blocks, a, new_scale, new_offset)
            better = loss < best_loss
            best_loss = torch.where(better, loss, best_loss)
            scale, offset = torch.where(better, new_scale, scale), torch.where(better, new_offset, offset)
        return self._polish(blocks, a, scale, offset)

    def _as_offset(self, scale, low):
        """What `codes_of` takes as the offset for a block that starts at `low`."""
        if self.spec.kind == "min":
            return low
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (-low / safe).round().clamp(self.spec.lowest_zero, self.top)

    def _finish(self, scale, low):
        """Scale and offset at stored precision."""
        scale = self.store(scale)
        return scale, self.store(self._as_offset(scale, low))

    def _least_squares(self, blocks, a, codes, sums, scale, low):
        """Best (scale, low) for fixed codes; the old ones where the 2×2 system is singular."""
        total, weighted = sums
        aq = a * codes
        sum_q, sum_qq, sum_qw = aq.sum(1), (aq * codes).sum(1), (aq * blocks).sum(1)
        if self.spec.kind == "zero":
            zero = self._as_offset(scale, low)
            cross = sum_qw - zero * weighted
            square = sum_qq - 2 * zero * sum_q + zero * zero * total
            new = torch.where(square > 0, cross / square, scale)
            return new, -zero * new
        determinant = total * sum_qq - sum_q * sum_q
        usable = determinant > 1e-12 * total * sum_qq
        new_scale = (total * sum_qw - sum_q * weighted) / determinant
        new_low = (sum_qq * weighted - sum_q * sum_qw) / determinant
        if self.mins_below_zero:
            above = new_low > 0
            new_low = new_low.clamp_max(0)
            new_scale = torch.where(above, sum_qw / sum_qq, new_scale)
        return torch.where(usable, new_scale, scale), torch.where(usable, new_low, low)

    def _polish(self, blocks, a, scale, offset):
        """Alternate rounding and least squares from stored-precision parameters; keep improvements."""
        scale = self.store(scale)
        best_loss, codes = self.loss(blocks, a, scale, offset)
        sums = a.sum(1), (a * blocks).sum(1)
        for _ in range(POLISH):
            if offset is None:
                q = self.levels_of(codes)
                square = (a * q * q).sum(1)
                new_scale = self.store(torch.where(square > 0, (a * q * blocks).sum(1) / square, scale))
                new_offset = None
            else:
                low = offset if self.spec.kind == "min" else -offset * scale
                new_scale, new_offset = self._finish(
                    *self._least_squares(blocks, a, codes, sums, scale, low))
            loss, new_codes = self.loss(blocks, a, new_scale, new_offset)
            better = loss < best_loss
            if not better.any():
                break
            best_loss = torch.where(better, loss, best_loss)
            scale = torch.where(better, new_scale, scale)
            offset = None if offset is None else torch.where(better, new_offset, offset)
            codes = torch.where(better[:, None], new_codes, codes)
        return scale, offset
