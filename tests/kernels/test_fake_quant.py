"""Per-token fake quantisation against its definition; the Triton kernel against its twin."""

import pytest
import torch

from optrot_edge.kernels import fake_quant as module
from optrot_edge.kernels.fake_quant import fake_quantize, fake_quantize_torch, fake_quantize_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
needs_triton = pytest.mark.skipif(module.triton is None, reason="triton is not installed")


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_by_hand():
    """Scale 1 for a largest value of 7: halves go to even."""
    x = torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.4, -6.6], [0.0] * 8, [-14.0, 1, 2, 3, 4, 5, 6, 7]])
    y, scales = fake_quantize(x, 4, return_scales=True)
    assert y[0].tolist() == [7, 0, 2, 2, 0, -2, 3, -7]
    assert y[1].tolist() == [0] * 8
    assert y[2].tolist() == [-14, 0, 2, 4, 4, 4, 6, 8]
    assert scales.shape == (3, 1) and scales[0] == 1 and scales[2] == 2


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_is_the_nearest_of_the_grids_points(bits, dtype):
    x = random(3, 5, 129).to(dtype)
    y, scales = fake_quantize(x, bits, return_scales=True)
    top = 2 ** (bits - 1) - 1
    assert y.dtype == dtype and scales.dtype == (dtype if dtype == torch.float64 else torch.float32)
    wide = x.double()
    assert ((scales.double() * top) / wide.abs().amax(-1, keepdim=True) - 1).abs().max() < 1e-6
    points = torch.arange(-top, top + 1) * scales[..., None].double()
    nearest = (wide[..., None] - points).abs().min(-1).values
    ulp = torch.finfo(dtype).eps * y.double().abs()  # y is a grid point, rounded to the dtype
    assert ((wide - y.double()).abs() <= nearest + ulp + 1e-6 * scales.double()).all()


def test_is_odd_and_each_token_stands_alone():
    x = random(6, 40)
    y = fake_quantize(x, 8)
    assert torch.equal(fake_quantize(-x, 8), -y)
    assert torch.equal(fake_quantize(x[3:4], 8), y[3:4])
    assert torch.equal(fake_quantize(x * 1024, 8), y * 1024)


def test_clip_cuts_the_largest_and_refines_the_rest():
    x = torch.tensor([[8.0, 1.0, -8.0, 0.3]])
    y, scales = fake_quantize(x, 4, clip=0.5, return_scales=True)
    assert scales == torch.tensor(4.0) / 7
    assert torch.allclose(y, torch.tensor([[4.0, 8 / 7, -4.0, 4 / 7]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_stays_in_its_token_and_shows(dtype):
    x = random(4, 50, dtype=dtype)
    x[1, 7], x[2, 9] = float("nan"), -float("inf")
    for quantize in (fake_quantize_torch, *([fake_quantize_triton] if module.triton else [])):
        y, scales = quantize(x.to(DEVICE if quantize is not fake_quantize_torch else "cpu"), 8, return_scales=True)
        assert y[1:3].isnan().all() and scales[1:3].isnan().all()
        assert y[[0, 3]].isfinite().all() and scales[[0, 3]].isfinite().all()


@pytest.mark.parametrize("smallest", [1e-45, 1e-40, 1e-37])
def test_tiny_tokens_become_zero_or_small_but_never_nan(smallest):
    x = torch.tensor([[smallest, 0.0, -smallest / 2]])
    assert (fake_quantize(x, 4).abs() <= smallest * 1.1).all()


def test_out_in_place_and_no_gradient():
    x = random(5, 12)
    expected, out = fake_quantize(x), torch.empty(5, 12)
    assert fake_quantize(x, out=out) is out and torch.equal(out, expected)
    here = x.clone()
    assert fake_quantize(here, out=here) is here and torch.equal(here, expected)
    assert not fake_quantize(x.clone().requires_grad_()).requires_grad
    assert fake_quantize(torch.empty(0, 4)).shape == (0, 4)
    assert fake_quantize(torch.empty(3, 0), return_scales=True)[1].shape == (3, 1)


@pytest.mark.parametrize(("x", "arguments", "words"), [
    (torch.ones(2, 2), {"bits": 1}, "bits 1"), (torch.ones(2, 2), {"bits": 9}, "bits 9"),
    (torch.ones(2, 2), {"clip": 0.0}, "clip 0.0"), (torch.ones(2, 2), {"clip": 1.5}, "clip 1.5"),
    (torch.ones(2, 2), {"clip": float("nan")}, "clip nan"),
    (torch.ones(()), {}, "last axis"), (torch.ones(2, 2).int(), {}, "int32"),
    (torch.ones(2, 2), {"out": torch.ones(2, 3)}, "out is"),
])
def test_refuses_what_does_not_fit(x, arguments, words):
    with pytest.raises(ValueError) as error:
        fake_quantize(x, **arguments)
    assert words in str(error.value)


def stored(x, dtype):
    """float32 `x` in `dtype` as the kernel's store does it: the interpreter truncates to bfloat16."""
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        x = (x.view(torch.int32) & -0x10000).view(torch.float32)
    return x.to(dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "clip"), [(8, 1.0), (4, 1.0), (4, 0.9), (2, 0.7)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 17, 100), (131, 33), (3, 4097), (2, 14336)])
def test_triton_equals_the_twin(shape, bits, clip, dtype):
    """Bit for bit: quotients and products are correctly rounded on both sides."""
    x = random(*shape, dtype=dtype).to(DEVICE)
    actual, scales = fake_quantize_triton(x, bits, clip=clip, return_scales=True)
    expected, expected_scales = fake_quantize_torch(x.float(), bits, clip=clip, return_scales=True)
    assert actual.dtype == dtype and torch.equal(scales, expected_scales)
    assert torch.equal(actual, stored(expected, dtype))
    here = x.clone()
    assert fake_quantize_triton(here, bits, clip=clip, out=here) is here and torch.equal(here, actual)


@needs_triton
def test_triton_takes_views_zeros_and_nothing():
    x = random(9, 30).to(DEVICE).T
    assert torch.equal(fake_quantize_triton(x), fake_quantize_torch(x))
    here = random(9, 30).to(DEVICE).T
    assert fake_quantize_triton(here, out=here) is here and torch.equal(here, fake_quantize_torch(x))
    assert torch.equal(fake_quantize_triton(x * 0), torch.zeros_like(x))
    for shape in ((0, 4), (3, 0)):
        y, scales = fake_quantize_triton(torch.empty(shape, device=DEVICE), return_scales=True)
        assert y.shape == shape and scales.shape == (shape[0], 1)


@needs_triton
def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="use fake_quantize_torch"):
        fake_quantize_triton(torch.ones(2, 2, device=DEVICE).double())
