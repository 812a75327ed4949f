"""MLX's own arrays and arithmetic: what is packed decodes in `mx.dequantize` to what the checkpoint says."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.exporters.mlx_blocks import check_grid, pack, unpack
from optrot_edge.gridspec import grid_spec
from optrot_edge.quantize.grids import Grid

mx = pytest.importorskip("mlx.core", reason="MLX is made for macOS and Linux")
DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
GRIDS = [f"mlx-{bits}bit-g{group}-{dtype}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)
         for dtype in DTYPES]


def quantised(name: str, rows: int = 6, columns: int = 384):
    """A matrix on that grid, with a row of zeros and an outlier."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    weight[1], weight[2, 7] = 0, 30.0
    grid = Grid(name)
    params = grid.fit(weight)
    return grid.pack(grid.round(weight, params), params)


def to_mlx(array: np.ndarray, dtype: str):
    return mx.array(array).view(mx.bfloat16) if dtype == "bf16" else mx.array(array)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 `values` rounded to the model's dtype."""
    return torch.from_numpy(values).to(getattr(torch, DTYPES[dtype])).float().numpy()


def decode(parts: dict, spec, dtype: str) -> np.ndarray:
    with mx.stream(mx.cpu):
        found = mx.dequantize(mx.array(parts["weight"]), to_mlx(parts["scales"], dtype),
                              to_mlx(parts["biases"], dtype), group_size=spec.group_size, bits=spec.bits)
        assert found.dtype == getattr(mx, DTYPES[dtype])
        return np.array(found.astype(mx.float32))


@pytest.mark.parametrize("name", GRIDS)
def test_mlx_decodes_what_was_packed(name):
    """Exactly `bias + scale · code`, product and sum rounded to the model's dtype: nothing in float32, and within two
    roundings of the checkpoint's float32 decoding otherwise."""
    tensor, dtype = quantised(name), name.split("-")[-1]
    spec, parts = tensor.spec, pack(tensor)
    scales, mins = (part[..., None] for part in tensor.group_parameters())
    products = rounded(tensor.codes.reshape(len(scales), -1, spec.group_size) * scales, dtype)
    found = decode(parts, spec, dtype)
    assert np.array_equal(found, rounded(products + mins, dtype).reshape(tensor.codes.shape))
    half_ulp = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 0.0}[dtype]
    slack = half_ulp * (np.abs(products) + np.abs(products + mins)).reshape(found.shape) * (1 + 2 * half_ulp)
    assert (np.abs(found - tensor.decode()) <= slack + 2.0**-24 * (half_ulp > 0)).all()


@pytest.mark.parametrize("name", GRIDS)
def test_unpack_is_the_inverse(name):
    tensor = quantised(name)
    again = unpack(pack(tensor), tensor.spec)
    assert np.array_equal(again.codes, tensor.codes) and np.array_equal(again.decode(), tensor.decode())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_layout_is_mlx_own(bits, monkeypatch):
    """Arrays of `mx.quantize` come back bit for bit from unpacking and packing, one row at a time too."""
    monkeypatch.setattr("optrot_edge.exporters.mlx_blocks.CHUNK", 1)
    weight = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    with mx.stream(mx.cpu):
        words, scales, biases = (np.array(part) for part in mx.quantize(mx.array(weight), group_size=64, bits=bits))
    spec = grid_spec(f"mlx-{bits}bit-g64-f32")
    tensor = unpack({"weight": words, "scales": scales, "biases": biases}, spec)
    assert np.abs(tensor.decode() - weight).max() <= np.abs(scales).max()
    assert np.array_equal(pack(tensor)["weight"], words)


def test_products_use_the_same_weights():
    """`mx.quantized_matmul`, which never decodes, against the decoded matrix."""
    tensor = quantised("mlx-4bit-g64-f32")
    x = np.random.default_rng(1).standard_normal((3, 384)).astype(np.float32)
    parts = pack(tensor)
    with mx.stream(mx.cpu):
        found = np.array(mx.quantized_matmul(mx.array(x), *(mx.array(parts[name]) for name in
                                                            ("weight", "scales", "biases")), group_size=64, bits=4))
    np.testing.assert_allclose(found, x @ tensor.decode().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["q4_0", "int4-g64-zero", "int7-g64-min", "int4-g16-min", "q4_k"])
def test_other_grids_are_refused(name):
    with pytest.raises(InputError, match="lm_head is on grid .* which MLX cannot store"):
        check_grid(grid_spec(name), "lm_head")


def test_damage_is_refused():
    tensor = quantised("mlx-3bit-g32-f16")
    for change in ({"codes": tensor.codes | 8}, {"scales": tensor.scales[:, :1]},
                   {"offsets": tensor.offsets.astype(np.float32)}, {"offsets": None}):
        with pytest.raises(InputError, match="below 8|scales and mins"):
            pack(dataclasses.replace(tensor, **change))
    with pytest.raises(ValueError, match="do not fit"):
        parts = pack(tensor)
        unpack(parts | {"scales": parts["scales"][:, :1]}, tensor.spec)
