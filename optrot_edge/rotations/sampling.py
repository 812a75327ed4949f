"""What a learner's step sees: rows of a model by inclusion probabilities, in systematic samples; batches of a text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch


class RowSampler:
    """Inclusion probabilities min(1, c·mass) for an expected number of rows of a whole model."""

    def __init__(self, mass: torch.Tensor):
        mass = mass.flatten().double()
        self.mass = mass[mass > 0].sort(descending=True).values
        self.below = self.mass.flip(0).cumsum(0).flip(0)  # mass of a row and all lighter ones

    def scale(self, count: float) -> float:
        """The c with Σ min(1, c·mass) = `count`."""
        certain = torch.arange(len(self.mass), dtype=torch.float64)  # rows that are heavier are always in
        fits = (count - certain) * self.mass <= self.below
        if count >= len(self.mass) or not fits.any():
            return 1e30
        first = int(fits.to(torch.uint8).argmax())
        return min(float((count - first) / self.below[first]), 1e30)


def systematic_sample(p: torch.Tensor, key: list[int]) -> torch.Tensor:
    """Sorted indices of a sample of rows with inclusion probabilities `p` [n]; the same for the same `key`.

    One uniform number decides: row i is in when the cumulative sum of p, shifted by it, passes an integer at
    i. The size is within one of Σp, so a loss estimate does not carry the noise of a random count.
    """
    ladder = p.cpu().double().cumsum(0) + np.random.default_rng(key).random()
    rungs = torch.cat([ladder[:1] - p[:1].cpu(), ladder]).floor()
    return (rungs[1:] > rungs[:-1]).nonzero()[:, 0].to(p.device)


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Without end, `size` of `count` indices (all if there are fewer), each once before any comes again."""
    queue = torch.empty(0, dtype=torch.long)
    while True:
        if len(queue) < min(size, count):
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:min(size, count)]
        queue = queue[min(size, count):]
