"""Sylvester's Hadamard matrices in numpy, for packages and runtimes that have no torch."""

from __future__ import annotations

import numpy as np


def sylvester(order: int) -> np.ndarray:
    """The orthogonal Walsh-Hadamard matrix, float32 [order, order], order a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (matrix / np.sqrt(order)).astype(np.float32)


def kronecker_orders(order: int) -> tuple[int, int]:
    """Orders, as equal as can be and the first not above the second, of the two matrices whose Kronecker product is
    `sylvester(order)`."""
    left = 1 << (order.bit_length() - 1) // 2
    return left, order // left
