"""The block Walsh-Hadamard transform against its matrix; the Triton kernel against its twin."""

import pytest
import torch

from optrot_edge.kernels import hadamard as module
from optrot_edge.kernels.hadamard import (
    TRITON_BLOCKS,
    block_hadamard,
    block_hadamard_torch,
    block_hadamard_triton,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(module.triton is None, reason="triton is not installed")


def sylvester(block):
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * block**-0.5


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("block", [1, 2, 4, 32, 128])
def test_is_a_block_diagonal_sylvester_matrix(block):
    x = random(3, 2, 3 * block)
    expected = (x.unflatten(-1, (3, block)) @ sylvester(block)).flatten(-2)
    assert (block_hadamard(x, block) - expected).abs().max() < 1e-13


def test_is_its_own_inverse_and_leaves_the_input_alone():
    x = random(4, 256)
    before = x.clone()
    assert (block_hadamard(block_hadamard(x, 64), 64) - x).abs().max() < 1e-13
    assert torch.equal(x, before)


def test_gradient_of_the_twin():
    x = random(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: block_hadamard(x, 4), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x = random(5, 1024).to(dtype)
    assert torch.equal(block_hadamard_torch(x, 1024), block_hadamard_torch(x.float(), 1024).to(dtype))


@pytest.mark.parametrize(("shape", "block"), [((4, 96), 64), ((4, 96), 24), ((4, 96), 0), ((), 2)])
def test_refuses_a_block_that_does_not_fit(shape, block):
    with pytest.raises(ValueError, match="power of two that divides"):
        block_hadamard(torch.ones(shape), block)


@needs_triton
@pytest.mark.parametrize("block", TRITON_BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_equals_the_twin(block, dtype):
    # One unit in the last place where float32 sums differ, or the interpreter truncates to bfloat16.
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    for shape in ((1, block), (3, 5, 3 * block), (131, block)):
        x = random(*shape).to(DEVICE, dtype)
        actual, expected = block_hadamard_triton(x, block), block_hadamard_torch(x, block)
        assert actual.dtype == dtype and actual.shape == x.shape
        assert (actual.float() - expected.float()).abs().max() <= tolerance * expected.abs().max().float()


@needs_triton
def test_triton_takes_transposed_and_empty_tensors():
    x = random(64, 6).to(DEVICE, torch.float32).T
    assert (block_hadamard_triton(x, 32) - block_hadamard_torch(x, 32)).abs().max() < 1e-6
    assert block_hadamard_triton(x[:0], 32).shape == (0, 64)


@needs_triton
def test_triton_refuses_other_blocks_and_float64():
    for x, block in ((torch.ones(2, 16), 16), (torch.ones(2, 64).double(), 64)):
        with pytest.raises(ValueError, match="blocks of 32 to 1024"):
            block_hadamard_triton(x.to(DEVICE), block)
