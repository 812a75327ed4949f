"""GGUF blocks against three dequantisers, gguf-py's, libgguf's and llama.cpp's own, bit for bit."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

import gguf
import libgguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optrot_edge.checkpoint import GGUF_GRIDS, QuantizedTensor, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_blocks import block_bytes, pack, unpack
from tests.stored_tensors import random_tensor

GRIDS = list(GGUF_GRIDS)


def ggml_dequantize(raw: np.ndarray, grid: str, weights: int) -> np.ndarray:
    """The weights in llama.cpp's own C dequantiser."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    dequantize = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{grid.replace('_k', '_K')}")
    dequantize.argtypes, dequantize.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    raw, out = np.ascontiguousarray(raw), np.empty(weights, np.float32)
    dequantize(raw.ctypes.data, out.ctypes.data, weights)
    return out


@pytest.mark.parametrize("grid", GRIDS)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_pack_is_bit_exact(grid, rows, blocks, seed):
    tensor = random_tensor(grid, rows, blocks, seed)
    raw = pack(tensor)
    assert raw.dtype == np.uint8 and raw.shape == (rows, blocks * block_bytes(tensor.spec))
    kind = gguf.GGMLQuantizationType[grid.upper()]
    with np.errstate(over="ignore"):
        decoded = tensor.decode()
        by_gguf = gguf.quants.dequantize(raw, kind)
    np.testing.assert_array_equal(by_gguf, decoded)
    np.testing.assert_array_equal(libgguf.dequantize_rows(raw, int(kind), decoded.shape[1]), decoded)
    np.testing.assert_array_equal(ggml_dequantize(raw, grid, decoded.size).reshape(decoded.shape), decoded)
    back, stored = unpack(raw, grid, tensor.codes.shape).parts(), tensor.parts()
    assert back.keys() == stored.keys()
    for name, part in stored.items():
        assert back[name].dtype == part.dtype
        np.testing.assert_array_equal(back[name].view(f"u{part.itemsize}"), part.view(f"u{part.itemsize}"))


@pytest.mark.parametrize("grid", GRIDS)
def test_any_block_unpacks_to_what_it_holds(grid):
    """Foreign files hold any bytes: what is unpacked decodes as gguf-py says, and packs to the same weights."""
    spec, rng = grid_spec(grid), np.random.default_rng(0)
    raw = rng.integers(0, 256, (16, 3 * block_bytes(spec)), np.uint8)
    kind = gguf.GGMLQuantizationType[grid.upper()]
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
        tensor = unpack(raw, grid, expected.shape)
        usable = np.isfinite(expected).all(1) & np.isfinite(tensor.decode()).all(1)
    assert usable.any()
    tensor = tensor.rows(usable)
    np.testing.assert_array_equal(tensor.decode(), expected[usable])
    np.testing.assert_array_equal(gguf.quants.dequantize(pack(tensor), kind), expected[usable])


@pytest.mark.parametrize("grid", GRIDS)
def test_block_size_is_ggmls(grid):
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[grid.upper()]]
    assert block_bytes(grid_spec(grid)) == size


def test_q8_0_stores_code_minus_128():
    tensor = QuantizedTensor(grid_spec("q8_0"), np.arange(32, dtype=np.uint8)[None] * 8,
                             np.ones((1, 1), np.float16))
    assert pack(tensor)[0, 2:].view(np.int8).tolist() == [8 * i - 128 for i in range(32)]


@pytest.mark.parametrize(("change", "message"), [
    ({"spec": grid_spec("int4-g128-sym")}, "int4-g128-sym, which GGUF cannot store; quantise to one of q4_0"),
    ({"codes": np.full((2, 64), 16, np.uint8)}, "below 16"),
    ({"codes": np.zeros((2, 48), np.uint8)}, "48 weights do not fill"),
    ({"scales": np.ones((2, 2), np.float32)}, "scales must be float16"),
    ({"scales": np.ones((2, 1), np.float16)}, "scales must be float16"),
    ({"scales": np.array([[1, np.inf]] * 2, np.float16)}, "NaN or infinity"),
    ({"offsets": None}, "mins must be float16"),
])
def test_pack_refuses(change, message):
    good = {"spec": grid_spec("q4_1"), "codes": np.zeros((2, 64), np.uint8),
            "scales": np.ones((2, 2), np.float16), "offsets": np.ones((2, 2), np.float16)}
    pack(QuantizedTensor(**good))
    with pytest.raises(InputError, match=message):
        pack(QuantizedTensor(**good | change))


@pytest.mark.parametrize(("grid", "change", "message"), [
    ("q4_k", {"subscales": np.full((2, 8), 64, np.uint8)}, "from 0 to 63"),
    ("q2_k", {"suboffsets": np.full((2, 16), 16, np.uint8)}, "from 0 to 15"),
    ("q5_k", {"suboffsets": None}, "as integer scales"),
    ("q3_k", {"subscales": np.full((2, 16), 32, np.int8)}, "from -32 to 31"),
    ("iq4_xs", {"subscales": np.zeros((2, 8), np.uint8)}, "needs int8"),
    ("q6_k", {"subscales": np.zeros((2, 8), np.int8)}, r"int8 \[2, 16\]"),
    ("q6_k", {"scales": np.full((2, 1), np.nan, np.float16)}, "NaN or infinity"),
    ("q6_k", {"codes": np.full((2, 256), 64, np.uint8)}, "below 64"),
    ("mxfp4", {"codes": np.full((2, 256), 15, np.uint8)}, "below 15"),
    ("mxfp4", {"scales": np.full((2, 8), 255, np.uint8)}, "E8M0 bytes below 255"),
])
def test_pack_refuses_damaged_super_blocks(grid, change, message):
    good = random_tensor(grid, 2, 256 // grid_spec(grid).block_size)
    pack(good)
    with pytest.raises(InputError, match=message):
        pack(dataclasses.replace(good, **change))
