"""GGUF blocks against gguf-py's dequantiser and ggml's own, bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optrot_edge.checkpoint import GGUF_GRIDS, QuantizedTensor, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_blocks import block_bytes, pack, unpack

GRIDS = list(GGUF_GRIDS)
EXTREMES = np.array([0, -0.0, 65504, -65504, 6e-8, -6e-8, 6.1e-5, 1, -1], np.float16)  # 6e-8: subnormal


def random_tensor(grid: str, rows: int, blocks: int, seed: int) -> QuantizedTensor:
    """Every code equally likely, some blocks all lowest or highest; scales of any sign and size."""
    rng, spec = np.random.default_rng(seed), grid_spec(grid)
    codes = rng.integers(0, spec.levels, (rows, blocks, 32), np.uint8)
    codes[rng.random((rows, blocks)) < 0.1] = 0
    codes[rng.random((rows, blocks)) < 0.1] = spec.levels - 1

    def halves():
        values = (rng.standard_normal((rows, blocks)) * 10.0 ** rng.uniform(-6, 2)).astype(np.float16)
        return np.where(rng.random((rows, blocks)) < 0.3, rng.choice(EXTREMES, (rows, blocks)), values)

    return QuantizedTensor(spec, codes.reshape(rows, -1), halves(), halves() if spec.kind == "min" else None)


def ggml_dequantize(raw: np.ndarray, grid: str, weights: int) -> np.ndarray:
    """The weights in llama.cpp's own C dequantiser."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base*"))
    dequantize = getattr(ctypes.CDLL(str(library)), f"dequantize_row_{grid}")
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
    with np.errstate(over="ignore"):
        decoded = tensor.decode()
        by_gguf = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[grid.upper()])
    np.testing.assert_array_equal(by_gguf, decoded)
    np.testing.assert_array_equal(ggml_dequantize(raw, grid, decoded.size).reshape(decoded.shape), decoded)
    back = unpack(raw, grid, tensor.codes.shape)
    np.testing.assert_array_equal(back.codes, tensor.codes)
    np.testing.assert_array_equal(back.scales.view(np.uint16), tensor.scales.view(np.uint16))
    if tensor.offsets is not None:
        np.testing.assert_array_equal(back.offsets.view(np.uint16), tensor.offsets.view(np.uint16))


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
