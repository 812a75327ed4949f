"""Hadamard constructions: every order claimed is one, and the fallback says what it is."""

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.rotations.hadamard import hadamard, random_hadamard

ORDERS = {1: "sylvester", 2: "sylvester", 64: "sylvester", 12: "paley-one", 28: "paley-one", 36: "paley-two",
          52: "paley-two", 76: "paley-two", 92: "williamson", 116: "williamson", 140: "paley-one", 244: "paley-one",
          344: "paley-one", 576: "paley-two-36 x sylvester-16", 896: "paley-one-28 x sylvester-32",
          960: "paley-one-60 x sylvester-16"}


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_signs(order):
    matrix, name = hadamard(order)
    assert name == ORDERS[order]
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


def test_every_multiple_of_four_below_156_but_none_other():
    missing = [n for n in range(1, 156) if (hadamard(n) is None) != (n > 2 and n % 4 != 0)]
    assert missing == []


@pytest.mark.parametrize("order", [576, 96, 72, 26, 9])
def test_random_hadamard_is_orthogonal_and_seeded(order):
    first, name = random_hadamard(order, torch.Generator().manual_seed(3))
    again, _ = random_hadamard(order, torch.Generator().manual_seed(3))
    other, _ = random_hadamard(order, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first.T @ first - torch.eye(order, dtype=torch.float64)).abs().max() < 1e-13
    assert ("dense-fallback" in name) == (hadamard(order) is None)


def test_order_must_be_positive():
    with pytest.raises(InputError, match="positive"):
        hadamard(0)
