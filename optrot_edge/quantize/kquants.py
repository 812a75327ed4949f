"""Scales of two levels (K-quants, IQ4_XS): integers per group against float16 scales of 256 weights.

First every group gets its best real scale (and min). Then the float16 d is chosen among candidates by the rise of the
groups' quadratic losses when their scales are rounded to multiples of it, and dmin likewise. From there, in turns:
every group tries the integers around its own, with its codes rounded anew and its min solved for; and d, dmin are
solved by least squares with integers and codes fixed. Only what lowers the weighted error is kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch

ROUNDS = 2  # of integers, then float16 scales
SHIFTS = 4  # integers tried to either side: rounding's error is jagged in the scale (GPTQ's is not: no gain, no harm)
REACH = [0.50 + 0.01 * k for k in range(56)]  # candidates let the largest integer be this share of the highest


def fit_super_blocks(grid, blocks: torch.Tensor, a: torch.Tensor) -> dict[str, torch.Tensor]:
    """Stored parameters of `blocks` [n, group] under weights `a`, for a `Grid` of two levels; 256 weights follow
    one another. Returns float32 "scales" (and "offsets") [n · group / 256], which float16 holds, and integers
    "subscales" (and "suboffsets") [n]."""
    return SuperBlockFit(grid, blocks, a).run()


class SuperBlockFit:
    """One chunk of super-blocks while their scales are chosen: d, dmin [m], integers sc, mn [m, groups]."""

    def __init__(self, grid, blocks: torch.Tensor, a: torch.Tensor):
        self.grid, self.blocks, self.a = grid, blocks, a
        self.affine = grid.spec.kind == "min"
        self.low, self.high = grid.spec.subscales
        self.groups = grid.spec.block_size // grid.spec.group_size
        self.total, self.weighted = a.sum(1), (a * blocks).sum(1)

    def run(self) -> dict[str, torch.Tensor]:
        """Search, then alternate; see the module."""
        spec = self.grid.spec
        real = type(self.grid)(replace(spec, subscales=None, scale_dtype="float32"), mins_below_zero=self.affine)
        scale, offset = real.search(self.blocks, self.a)
        _, codes = self.grid.loss(self.blocks, self.a, scale, offset)
        self._start(codes, scale, offset)
        self.best, self.codes = self._loss(self.sc, self.mn)
        for _ in range(ROUNDS):
            before = self.best
            self._try_integers()
            self._solve_scales()
            if torch.equal(self.best, before):
                break
        out = {"scales": self.d, "subscales": self.sc.flatten()}
        return out | ({"offsets": self.dmin, "suboffsets": self.mn.flatten()} if self.affine else {})

    def _of_groups(self, per_block: torch.Tensor) -> torch.Tensor:
        """[m, groups] of [m · groups]."""
        return per_block.view(-1, self.groups)

    def _loss(self, sc, mn, d=None, dmin=None):
        """Loss [n] and codes with those integers."""
        d, dmin = self.d if d is None else d, self.dmin if dmin is None else dmin
        offset = -(dmin[:, None] * mn).flatten() if self.affine else None
        return self.grid.loss(self.blocks, self.a, (d[:, None] * sc).flatten(), offset)

    def _moments(self, codes):
        """Σ a l², Σ a l, Σ a l w of every group [m, groups], l the levels of `codes`."""
        levels = self.grid.levels_of(codes)
        al = self.a * levels
        return tuple(self._of_groups(x.sum(1)) for x in (al * levels, al, al * self.blocks))

    def _start(self, codes, scale, offset) -> None:
        """d, dmin and integers by the groups' quadratic losses around (scale, offset), codes fixed."""
        square, cross, _ = self._moments(codes)
        scale, total = self._of_groups(scale), self._of_groups(self.total)
        curvature = square
        if self.affine:  # the min follows the scale
            slope = torch.where(total > 0, cross / total, 0.0)
            curvature = (square - slope * cross).clamp_min(0)
        self.d, self.sc = self._round_to_multiples(scale, curvature, self.low, self.high)
        self.dmin = self.mn = None
        if self.affine:
            moved = self.d[:, None] * self.sc - scale
            wanted = -(self._of_groups(offset) - slope * moved)
            self.dmin, self.mn = self._round_to_multiples(wanted.clamp_min(0), total, self.low, self.high)

    def _round_to_multiples(self, values, curvature, low: int, high: int):
        """Stored step [m] and integers [m, groups] with the least Σ curvature (step · integer − value)²; NaN where no
        step is finite."""
        extreme = values.gather(1, values.abs().argmax(1, keepdim=True))
        best_loss = torch.full_like(extreme, float("inf"))
        best, best_integers = torch.full_like(extreme, float("nan")), torch.zeros_like(values)
        for end in [e * reach for e in (low, high) if e for reach in REACH]:
            step = self.grid.store(extreme / end)
            integers = _nearest_integers(values, step, low, high)
            loss = (step * integers).sub_(values).square_().mul_(curvature).sum(1, keepdim=True)
            better = loss < best_loss
            best_loss, best = torch.where(better, loss, best_loss), torch.where(better, step, best)
            best_integers = torch.where(better, integers, best_integers)
        return best.squeeze(1), best_integers

    def _try_integers(self) -> None:
        """Every group takes the best integers around its own."""
        centre, most = self.sc, min(SHIFTS, (self.high - self.low) // 4)
        for shift in sorted(range(-most, most + 1), key=abs):  # of equals the nearest
            sc = (centre + shift).clamp_(self.low, self.high)
            if not self.affine:
                if shift:
                    self._keep(sc, None)
                continue
            scale = (self.d[:, None] * sc).flatten()
            offset = -(self.dmin[:, None] * self.mn).flatten()
            codes = self.grid.codes_of(self.blocks, scale[:, None], offset[:, None])
            weighted = (self.a * codes).sum(1)
            wanted = torch.where(self.total > 0, (scale * weighted - self.weighted) / self.total, 0.0)
            mn = _nearest_integers(self._of_groups(wanted), self.dmin[:, None], self.low, self.high)
            self._keep(sc, mn)

    def _keep(self, sc, mn) -> None:
        """Adopt these integers in the groups where they are better."""
        loss, codes = self._loss(sc, mn)
        better = loss < self.best
        self.best = torch.where(better, loss, self.best)
        self.codes = torch.where(better[:, None], codes, self.codes)
        chosen = self._of_groups(better)
        self.sc = torch.where(chosen, sc, self.sc)
        if self.affine:
            self.mn = torch.where(chosen, mn, self.mn)

    def _solve_scales(self) -> None:
        """d and dmin by least squares with integers and codes fixed, where they are better once stored."""
        square, cross, product = self._moments(self.codes)
        sc, mn = self.sc, self.mn
        dd, dw = (sc * sc * square).sum(1), (sc * product).sum(1)
        if not self.affine:
            d, dmin = torch.where(dd > 0, dw / dd, self.d), None
        else:
            total, weighted = self._of_groups(self.total), self._of_groups(self.weighted)
            dm, mm, mw = -(sc * mn * cross).sum(1), (mn * mn * total).sum(1), -(mn * weighted).sum(1)
            determinant = dd * mm - dm * dm
            usable = determinant > 1e-6 * dd * mm
            d = torch.where(usable, (mm * dw - dm * mw) / determinant, self.d)
            dmin = self.grid.store(torch.where(usable, (dd * mw - dm * dw) / determinant, self.dmin))
        d = self.grid.store(d)
        loss, codes = self._loss(sc, mn, d, dmin)
        better = self._of_groups(loss).sum(1) < self._of_groups(self.best).sum(1)
        per_block = better.repeat_interleave(self.groups)
        self.d = torch.where(better, d, self.d)
        if self.affine:
            self.dmin = torch.where(better, dmin, self.dmin)
        self.best = torch.where(per_block, loss, self.best)
        self.codes = torch.where(per_block[:, None], codes, self.codes)


def _nearest_integers(values, step, low: int, high: int):
    """Integers whose multiples of `step` are nearest to `values`; 0 where the step is 0."""
    quotient = values / torch.where(step == 0, torch.ones_like(step), step)
    return torch.where(step == 0, torch.zeros_like(quotient), quotient.round_()).clamp_(low, high)
