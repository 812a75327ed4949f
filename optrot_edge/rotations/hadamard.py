"""Hadamard matrices of any constructible order, built on demand: no tables of signs.

Sylvester (1867), Paley I and II (Paley 1933) over prime-power fields, Williamson (1944).
An order with no construction here gets a dense orthogonal matrix, and its name says so.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from optrot_edge.errors import InputError

# First rows of symmetric circulant Williamson quadruples of odd order n, found by exhaustive search:
# bit k of each integer is the sign (1: minus) at positions k + 1 and n - k - 1; position 0 is plus.
WILLIAMSON = {
    23: (752, 794, 671, 1162),
    29: (1765, 9461, 459, 7204),
}


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p^k and p prime, or None."""
    if q < 2:
        return None
    p = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    k, rest = 0, q
    while rest % p == 0:
        rest //= p
        k += 1
    return (p, k) if rest == 1 else None


def _poly_times_x(a: tuple[int, ...], modulus: tuple[int, ...], p: int) -> tuple[int, ...]:
    """a(x)·x mod a monic polynomial over GF(p); coefficients lowest first, leading 1 left out."""
    top = a[-1]
    shifted = (0, *a[:-1])
    return tuple((s - top * m) % p for s, m in zip(shifted, modulus, strict=True))


def _field(p: int, k: int) -> list[tuple[int, ...]]:
    """Powers of a primitive element: all p^k − 1 non-zero elements of GF(p^k), in order."""
    q = p**k
    for code in range(q):
        modulus = tuple(code // p**i % p for i in range(k))
        element = (1,) + (0,) * (k - 1)
        powers = [element]
        while len(powers) < q:
            element = (element[0] * (code or 1) % p,) if k == 1 else _poly_times_x(element, modulus, p)
            if element == powers[0] or not any(element):
                break
            powers.append(element)
        if len(powers) == q - 1:
            return powers
    raise AssertionError(f"GF({p}^{k}) has a primitive polynomial")


def _jacobsthal(q: int, p: int, k: int) -> torch.Tensor:
    """Q[a, b] = χ(a − b): +1 on non-zero squares of GF(q), −1 on non-squares, 0 on the diagonal."""
    powers = _field(p, k)
    elements = [(0,) * k, *powers]
    weights = [p**i for i in range(k)]
    chi = torch.zeros(q, dtype=torch.float64)
    for exponent, element in enumerate(powers):
        chi[sum(c * w for c, w in zip(element, weights, strict=True))] = 1.0 - 2.0 * (exponent % 2)
    digits = torch.tensor(elements)
    difference = (digits[:, None, :] - digits[None, :, :]) % p
    return chi[(difference * torch.tensor(weights)).sum(-1)]


def _paley_one(n: int) -> torch.Tensor | None:
    """Order q + 1 for a prime power q ≡ 3 mod 4."""
    power = _prime_power(n - 1)
    if not power or (n - 1) % 4 != 3:
        return None
    skew = torch.zeros(n, n, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(n - 1, *power)
    return torch.eye(n, dtype=torch.float64) + skew


def _paley_two(n: int) -> torch.Tensor | None:
    """Order 2(q + 1) for a prime power q ≡ 1 mod 4."""
    q = n // 2 - 1
    power = _prime_power(q)
    if n % 4 or not power or q % 4 != 1:
        return None
    conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
    conference[0, 0] = 0
    conference[1:, 1:] = _jacobsthal(q, *power)
    one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    eye = torch.eye(q + 1, dtype=torch.float64)
    return torch.kron(conference, one.double()) + torch.kron(eye, other.double())


def _williamson(n: int) -> torch.Tensor | None:
    """Order 4m from four symmetric circulants with A² + B² + C² + D² = 4m·I."""
    m = n // 4
    if n % 4 or m not in WILLIAMSON:
        return None
    blocks = []
    for bits in WILLIAMSON[m]:
        row = torch.ones(m, dtype=torch.float64)
        for k in range(m // 2):
            if bits >> k & 1:
                row[k + 1] = row[m - k - 1] = -1
        index = (torch.arange(m)[None, :] - torch.arange(m)[:, None]) % m
        blocks.append(row[index])
    a, b, c, d = blocks
    return torch.cat([torch.cat(row, 1) for row in
                      ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))])


@cache
def hadamard(n: int) -> tuple[torch.Tensor, str] | None:
    """A ±1 Hadamard matrix [n, n] (float64) and the name of its construction, or None.

    Doubling (Sylvester) is applied to the smallest constructible core of `n`.
    """
    if n < 1:
        raise InputError(f"a Hadamard matrix of order {n} does not exist; the order must be positive")
    core = n
    while core % 2 == 0:
        core //= 2
    while core <= n:
        small = torch.ones(1, 1, dtype=torch.float64) if core == 1 else None
        name = "sylvester"
        for build in (_paley_one, _paley_two, _williamson):
            if small is None and core % 4 == 0:
                small, name = build(core), build.__name__.strip("_").replace("_", "-")
        if small is not None:
            doubled = core
            while doubled < n:
                small = torch.cat([torch.cat([small, small], 1), torch.cat([small, -small], 1)])
                doubled *= 2
            return small, name if core in (1, n) else f"{name}-{core} x sylvester-{n // core}"
        core *= 2
    return None


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Haar-distributed orthogonal matrix [n, n], float64 (QR with the signs of R's diagonal)."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).contiguous()


class RandomHadamard(NamedTuple):
    """A randomised orthogonal Hadamard rotation as it is drawn: rows of `scale` · `base` [n, n] in a random `order`,
    with random `signs`; `name` is the construction's. Draws of one order share their base."""

    base: torch.Tensor
    scale: float
    signs: torch.Tensor
    order: torch.Tensor
    name: str

    @property
    def matrix(self) -> torch.Tensor:
        """The rotation [n, n], float64."""
        return self.signs.double()[:, None] * (self.base * self.scale)[self.order]


def draw_hadamard(n: int, generator: torch.Generator) -> RandomHadamard:
    """A random Hadamard of order n: signs and order of its rows are random (QuaRot, arXiv 2404.00456, section 3.1).

    When no Hadamard matrix of order n can be built, its base is kron(random orthogonal m, Sylvester 2^k) with
    n = m·2^k, named "dense-fallback-m x sylvester-2^k", and not shared.
    """
    built = hadamard(n)
    if built is None:
        odd = n
        while odd % 2 == 0:
            odd //= 2
        small, _ = hadamard(n // odd)
        base, scale = torch.kron(random_orthogonal(odd, generator), small), (n // odd) ** -0.5
        name = f"dense-fallback-{odd} x sylvester-{n // odd}"
    else:
        base, scale, name = built[0], n**-0.5, built[1]
    signs = torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0
    return RandomHadamard(base, scale, signs, torch.randperm(n, generator=generator), name)


def random_hadamard(n: int, generator: torch.Generator) -> tuple[torch.Tensor, str]:
    """A randomised orthogonal Hadamard rotation [n, n], float64, and its construction's name; see `draw_hadamard`."""
    drawn = draw_hadamard(n, generator)
    return drawn.matrix, drawn.name
