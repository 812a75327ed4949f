"""Transforms of a linear's input that cannot be fused, for analysis: `x → x T`, `W → W T⁻ᵀ`.

Each has `apply(x)` = x T, `undo(y)` = y T⁻¹, `weight(W)` = W T⁻ᵀ, `weight_back(W')` = W' Tᵀ, all on rows [..., n] and
differentiable, and `parameters`, the tensors that are learned. Of those that learn, `tensors()`, by name, are all that
make it again.
"""

from __future__ import annotations

import math

import torch

from optrot_edge.rotations.hadamard import RandomHadamard, draw_hadamard, random_orthogonal


class Orthogonal:
    """An orthogonal T, for which weights turn as inputs do."""

    parameters: list[torch.Tensor] = []

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x T."""
        raise NotImplementedError

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        """y Tᵀ."""
        raise NotImplementedError

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        """W T."""
        return self.apply(w)

    def weight_back(self, w: torch.Tensor) -> torch.Tensor:
        """W' Tᵀ."""
        return self.undo(w)


class Hadamard(Orthogonal):
    """A random Hadamard, kept as it was drawn (`hadamard.draw_hadamard`): a matrix per use, not one per transform."""

    def __init__(self, drawn: RandomHadamard):
        self.drawn = drawn

    @classmethod
    def start(cls, n: int, generator: torch.Generator) -> Hadamard:
        """One of order n."""
        return cls(draw_hadamard(n, generator))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.drawn.matrix.to(x)

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.drawn.matrix.to(y).T


class Butterfly(Orthogonal):
    """ButterflyQuant's rotation (arXiv 2509.09679): log₂ stages of Givens rotations, each of n/2 pairs of channels.

    n = m · 2^k: an orthogonal `mix` [m, m], drawn and fixed, over the m blocks, then k stages inside each block, whose
    `angles` [k, n/2] are learned. They start at π/4, a Hadamard matrix but for signs.
    """

    def __init__(self, angles: torch.Tensor, mix: torch.Tensor):
        self.angles, self.mix = angles, mix
        self.parameters = [angles]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the constructor takes."""
        return {"angles": self.angles, "mix": self.mix}

    @classmethod
    def start(cls, n: int, generator: torch.Generator) -> Butterfly:
        """T before learning."""
        block = n & -n
        angles = torch.full((block.bit_length() - 1, n // 2), math.pi / 4)
        return cls(angles, random_orthogonal(n // block, generator))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._inside(self._mixed(x, self.mix), self._blocks(x))

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        return self._mixed(self._inside(y, self._blocks(y).mT), self.mix.T)

    @staticmethod
    def _mixed(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        blocks = x.view(*x.shape[:-1], len(mix), -1)
        return (mix.to(x).T @ blocks).reshape(x.shape)

    @staticmethod
    def _inside(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, *blocks.shape[:2]).transpose(0, 1)
        return (rows @ blocks).transpose(0, 1).reshape(x.shape)

    def _blocks(self, like: torch.Tensor) -> torch.Tensor:
        """The stages as one matrix [m, 2^k, 2^k]: the one of stage s turns channels 2^s apart."""
        angles = self.angles.to(like)
        cos, sin = angles.cos(), angles.sin()
        blocks = like.new_ones(len(self.mix) * 2 ** len(angles), 1, 1)
        for stage in range(len(angles)):
            low, high = blocks.unflatten(0, (-1, 2)).unbind(1)
            c, s = (values[stage].view(len(low), 1, -1) for values in (cos, sin))
            blocks = torch.cat([torch.cat([low * c, low * -s], -1), torch.cat([high * s, high * c], -1)], -2)
        return blocks


class Kronecker:
    """FlatQuant's invertible T = left ⊗ right (arXiv 2410.09426), [n₁, n₁] and [n₂, n₂], n₁ n₂ = n."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor):
        self.left, self.right = left, right
        self.parameters = [left, right]

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the constructor takes."""
        return {"left": self.left, "right": self.right}

    @classmethod
    def start(cls, n: int, generator: torch.Generator) -> Kronecker:
        """Random orthogonal factors, as near to square as n allows."""
        first = next(k for k in range(math.isqrt(n), 0, -1) if n % k == 0)
        return cls(*(random_orthogonal(k, generator).float() for k in (first, n // first)))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self._times(x, self.left, self.right)

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        return self._times(y, *map(torch.linalg.inv, self._wide(y)))

    def weight(self, w: torch.Tensor) -> torch.Tensor:
        return self._times(w, *(torch.linalg.inv(factor).T for factor in self._wide(w)))

    def weight_back(self, w: torch.Tensor) -> torch.Tensor:
        return self._times(w, self.left.T, self.right.T)

    def _wide(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left.to(like), self.right.to(like)

    @staticmethod
    def _times(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """`x (left ⊗ right)`."""
        matrix = x.view(*x.shape[:-1], len(left), len(right))
        return (left.to(x).T @ matrix @ right.to(x)).reshape(x.shape)
