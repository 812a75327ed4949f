"""The block Walsh-Hadamard transform against its matrix; the Triton kernel against its twin."""

import pytest
import torch

from optrot_edge.kernels import hadamard as module
from optrot_edge.kernels.hadamard import block_hadamard, block_hadamard_torch, block_hadamard_triton
from optrot_edge.rotations.hadamard import hadamard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One unit in the last place where float32 sums differ, or the interpreter truncates to bfloat16.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
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


@pytest.mark.parametrize(("order", "power"), [(12, 1), (12, 8), (20, 2), (28, 4), (2, 4)])
def test_core_comes_before_sylvester(order, power):
    core, _ = hadamard(order)
    block = order * power
    matrix = torch.kron(sylvester(power), core * order**-0.5)
    x = random(2, 5, 3 * block)
    expected = (x.unflatten(-1, (3, block)) @ matrix).flatten(-2)
    actual = block_hadamard(x, block, core=core)
    assert (actual - expected).abs().max() < 1e-13
    assert (block_hadamard(actual, block, core=core.T) - x).abs().max() < 1e-13


def test_core_of_sylvester_is_the_plain_transform():
    core, _ = hadamard(4)
    x = random(3, 64)
    assert (block_hadamard(x, 64, core=core) - block_hadamard(x, 64)).abs().max() < 1e-13


@pytest.mark.parametrize("transposed", [False, True])
def test_out_and_in_place(transposed):
    x = random(24, 24).float()
    x = x.T if transposed else x
    core = hadamard(12)[0]
    for options in ({"block": 8}, {"block": 24, "core": core}):
        expected, out = block_hadamard(x, **options), torch.empty_like(x)
        assert block_hadamard(x, **options, out=out) is out and torch.equal(out, expected)
        here = x.clone()
        assert block_hadamard(here, **options, out=here) is here and torch.equal(here, expected)


@pytest.mark.parametrize(("shape", "block"), [((4, 96), 64), ((4, 96), 24), ((4, 96), 0), ((), 2)])
def test_refuses_a_block_that_does_not_fit(shape, block):
    with pytest.raises(ValueError, match="power of two that divides"):
        block_hadamard(torch.ones(shape), block)


@pytest.mark.parametrize(("block", "core", "out", "words"), [
    (36, torch.ones(12, 12), None, "12 times a power of two"), (6, torch.ones(12, 12), None, "12 times a power of two"),
    (24, torch.ones(12, 6), None, "square"), (8, torch.ones(0, 0), None, "square"),
    (8, torch.tensor(1.0), None, "square"),
    (8, None, torch.ones(4, 71), "out is"), (8, None, torch.ones(4, 72).half(), "out is"),
    (8, None, torch.ones(4, 72).requires_grad_(), "gradient")])
def test_refuses_a_core_or_out_that_does_not_fit(block, core, out, words):
    with pytest.raises(ValueError, match=words):
        block_hadamard(torch.ones(4, 72), block, core=core, out=out)


def assert_twins_agree(x, block, core=None):
    x = x.to(DEVICE)
    core = None if core is None else core.to(DEVICE)
    actual, expected = (f(x, block, core=core) for f in (block_hadamard_triton, block_hadamard_torch))
    assert actual.dtype == x.dtype and actual.shape == x.shape
    assert (actual.float() - expected.float()).abs().max() <= TOLERANCES[x.dtype] * expected.abs().max().float()
    here = x.clone()
    assert block_hadamard_triton(here, block, core=core, out=here) is here and torch.equal(here, actual)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("block", [2, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768])
def test_triton_equals_the_twin(block, dtype):
    for shape in ((1, block), (3, 3 * block), (131 if block < 4096 else 3, block)):
        assert_twins_agree(random(*shape).to(dtype), block)


@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("order", "power"), [(12, 1), (12, 2), (12, 64), (20, 16), (28, 4), (28, 512), (36, 8),
                                              (44, 1), (60, 2), (1, 8), (12, 4096), (28, 1024), (64, 512)])
def test_triton_equals_the_twin_with_a_core(order, power, dtype):
    core, block = hadamard(order)[0], order * power
    for shape in ((1, block), (37 if block < 1000 else 2, 3 * block)):
        assert_twins_agree(random(*shape).to(dtype), block, core)


@needs_triton
def test_triton_takes_transposed_and_empty_tensors():
    x = random(64, 6).to(DEVICE, torch.float32).T
    assert (block_hadamard_triton(x, 32) - block_hadamard_torch(x, 32)).abs().max() < 1e-6
    assert block_hadamard_triton(x[:0], 32).shape == (0, 64)
    here = random(64, 6).to(DEVICE, torch.float32).T
    assert block_hadamard_triton(here, 32, out=here) is here
    assert (here - block_hadamard_torch(x, 32)).abs().max() < 1e-6


@needs_triton
def test_triton_refuses_what_it_does_not_do():
    for x, block, order in ((torch.ones(2, 16), 1, 1), (torch.ones(2, 64).double(), 64, 1),
                            (torch.ones(2, 68), 68, 68)):
        with pytest.raises(ValueError, match="use block_hadamard_torch"):
            block_hadamard_triton(x.to(DEVICE), block, core=hadamard(order)[0].to(DEVICE))


@pytest.mark.parametrize("order", [60, 68])
def test_cores_of_every_size_are_taken(order):
    """Up to 64 in the kernel, beyond by the twin; there and back."""
    core = hadamard(order)[0].to(DEVICE)
    x = random(3, 2 * order).to(DEVICE, torch.float32)
    there = block_hadamard(x, 2 * order, core=core)
    assert (there - x).abs().max() > 0.1
    assert (block_hadamard(there, 2 * order, core=core.T) - x).abs().max() < 1e-5
