"""Grids whose levels are a table: IQ4_NL and IQ4_XS (sixteen integers), MXFP4 (E2M1 with a power of two as scale)."""

from __future__ import annotations

import torch

LOWEST_EXPONENT, HIGHEST_EXPONENT = -127, 127  # of E8M0; byte 255 is NaN
STRETCHES = [1 + 0.02 * k for k in range(-15, 14)]  # where the largest entry may lie, of the end of the table


class Codebook:
    """Ascending levels; a code is a level's place.

    The midpoints between levels are multiples of 1 / `fine`, so what is nearest is the same within each cell of that
    width and a table answers, many times faster than a binary search.
    """

    def __init__(self, levels: tuple[float, ...]):
        self.levels = torch.tensor(levels, dtype=torch.float64)
        self.center = int(self.levels.abs().argmin())
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        self.fine = next(k for k in (1, 2, 4, 8) if torch.equal((middles * k).round(), middles * k))
        self.first, self.last = (int((end * self.fine).floor()) for end in (middles[0] - 1, middles[-1] + 1))
        cells = torch.arange(self.first, self.last + 1, dtype=torch.float64) + 0.5
        self._nearest = torch.bucketize(cells / self.fine, middles)
        self._tables: dict = {}

    def _table(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels, and the nearest code in every cell, as `like` is."""
        key = like.dtype, like.device
        if key not in self._tables:
            self._tables[key] = self.levels.to(like), self._nearest.to(like)
        return self._tables[key]

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """Codes, as floats, of the levels nearest to `x`; the upper one at a midpoint, any for NaN."""
        cell = (x * self.fine).floor_().clamp_(self.first, self.last).sub_(self.first).nan_to_num_(0.0)
        return self._table(x)[1].index_select(0, cell.int().flatten()).view(x.shape)

    def levels_of(self, codes: torch.Tensor) -> torch.Tensor:
        """Levels of (float) codes."""
        return self._table(codes)[0].index_select(0, codes.int().flatten()).view(codes.shape)

    def search(self, blocks: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Float scale [n] of `blocks` [n, group] under weights `a`: candidates put the entry of largest magnitude near
        either end of the table, and each has its best scale in closed form."""
        extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)).squeeze(1)
        best_gain, best = torch.full_like(extreme, -1.0), torch.zeros_like(extreme)
        aw, low, high = a * blocks, float(self.levels[0]), float(self.levels[-1])
        ends = [end * stretch for end in (low, high) for stretch in STRETCHES]
        for end in ends:
            inverse = torch.where(extreme == 0, 0.0, end / extreme)
            q = self.levels_of(self.nearest(blocks * inverse[:, None]))
            cross, square = (aw * q).sum(1), (a * q).mul_(q).sum(1)
            gain = torch.where(square > 0, cross * cross / square, 0.0)
            better = gain > best_gain
            best_gain = torch.where(better, gain, best_gain)
            best = torch.where(better, torch.where(square > 0, cross / square, 0.0), best)
        return torch.where(extreme == 0, 0.0, best)

    def search_exponent(self, blocks: torch.Tensor, a: torch.Tensor, loss) -> torch.Tensor:
        """Best power of two [n] as the scale: the smallest that clips nothing is the first candidate, then smaller
        ones; `loss(blocks, a, scale, None)` judges."""
        top = blocks.abs().amax(1)
        exponent = torch.frexp(top / float(self.levels[-1]))[1].clamp(LOWEST_EXPONENT, HIGHEST_EXPONENT)
        best_loss = torch.full_like(top, float("inf"))
        best = torch.zeros_like(exponent)
        for shift in range(3):
            candidate = (exponent - shift).clamp_min(LOWEST_EXPONENT)
            found, _ = loss(blocks, a, torch.ldexp(torch.ones_like(top), candidate), None)
            better = found < best_loss
            best_loss, best = torch.where(better, found, best_loss), torch.where(better, candidate, best)
        best = torch.where(top == 0, LOWEST_EXPONENT, best)
        return torch.ldexp(torch.ones_like(top), best)
