"""Transforms of a linear's input that cannot be fused, for analysis: `x → x T`, `W → W T⁻ᵀ`.

Each has `apply(x)` = x T, `undo(y)` = y T⁻¹, `weight(W)` = W T⁻ᵀ, `weight_back(W')` = W' Tᵀ, all on rows [..., n] and
differentiable, and `parameters`, the tensors that are learned. `tensors()`, by name, are all that make it again.
"""

from __future__ import annotations

import math

import torch

from optrot_edge.rotations.hadamard import random_hadamard, random_orthogonal


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


class Dense(Orthogonal):
    """T as a matrix [n, n]."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix = matrix

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the constructor takes."""
        return {"matrix": self.matrix}

    @classmethod
    def hadamard(cls, n: int, generator: torch.Generator) -> Dense:
        """A random Hadamard, see `hadamard.random_hadamard`."""
        return cls(random_hadamard(n, generator)[0])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix.to(x)

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.matrix.to(y).T


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
        x = self._mixed(x, self.mix)
        for stage in range(len(self.angles)):
            x = self._turned(x, stage, 1)
        return x

    def undo(self, y: torch.Tensor) -> torch.Tensor:
        for stage in reversed(range(len(self.angles))):
            y = self._turned(y, stage, -1)
        return self._mixed(y, self.mix.T)

    @staticmethod
    def _mixed(x: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        blocks = x.view(*x.shape[:-1], len(mix), -1)
        return (mix.to(x).T @ blocks).reshape(x.shape)

    def _turned(self, x: torch.Tensor, stage: int, sign: int) -> torch.Tensor:
        """Channels 2^stage apart turned by the stage's angles."""
        stride = 2**stage
        pairs = x.view(*x.shape[:-1], -1, 2, stride)
        angle = self.angles[stage].to(x).view(-1, stride) * sign
        a, b, c, s = pairs[..., 0, :], pairs[..., 1, :], angle.cos(), angle.sin()
        return torch.stack([c * a + s * b, c * b - s * a], -2).reshape(x.shape)


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
