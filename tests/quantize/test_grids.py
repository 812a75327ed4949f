"""Grids: frozen parameters have stored precision, rounding is nearest, fits are at least the plain ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optrot_edge.checkpoint import GGUF_GRIDS, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.gridspec import STORED_DTYPES
from optrot_edge.quantize.grids import Grid, GridParams

ONE_LEVEL = [name for name, spec in GGUF_GRIDS.items() if not spec.subscales and not spec.codebook]
TABLES = [name for name in GGUF_GRIDS if name not in ONE_LEVEL]
INTEGER = [*ONE_LEVEL, "int2-g16-min", "int3-g64-sym", "int4-g32-zero", "int8-g96-zero", "int4-g192-sym",
           "int2-g128-zero", "int4-g16-zero", "int8-g256-zero"]
MLX = ["mlx-2bit-g32", "mlx-4bit-g64", "mlx-5bit-g64-bf16", "mlx-6bit-g128-bf16", "mlx-8bit-g128-f32"]
GRIDS = [*INTEGER, *TABLES, *MLX]
EVERY = [*GGUF_GRIDS, *(f"mlx-{bits}bit-g{group}-{dtype}" for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)
                        for dtype in ("f16", "bf16", "f32")),
         *(f"int{bits}-g{group}-{kind}" for bits in (2, 4, 8) for group in (16, 32, 64, 128, 256)
           for kind in ("sym", "zero", "sym-f16", "zero-f16"))]


def sample(rows=24, columns=768, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    w[3] = 0
    w[4, :32] = 0.25  # a constant block
    w[5, 7] = 9.0  # an outlier
    return w, torch.rand(columns, generator=generator) + 0.1


@pytest.mark.parametrize("name", GRIDS)
def test_round_trip_and_nearest(name):
    grid, (w, h) = Grid(name), sample()
    params = grid.fit(w, h)
    codes = grid.round(w, params)
    assert codes.dtype == torch.uint8 and int(codes.max()) < grid.spec.levels
    decoded = grid.decode(codes, params)
    assert torch.equal(grid.decode(grid.round(decoded, params), params), decoded), "decode ∘ round is idempotent"
    every = torch.stack([grid.decode(torch.full_like(codes, q), params) for q in range(grid.spec.levels)])
    nearest = (every - w).abs().amin(0)
    assert ((decoded - w).abs() <= nearest * (1 + 1e-5) + 1e-7).all()


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(EVERY), st.integers(0, 2**16), st.floats(-6, 3), st.floats(-30, 30), st.booleans())
def test_what_was_decoded_rounds_to_itself(name, seed, exponent, shift, sparse):
    """On every grid that an exporter packs, for weights of any size and centre."""
    grid, generator = Grid(name), torch.Generator().manual_seed(seed)
    w = torch.randn(2, 512, generator=generator)
    w = (w * (torch.rand(2, 512, generator=generator) < 0.1) if sparse else w + shift) * 10**exponent
    params = grid.fit(w)
    codes = grid.round(w, params)
    decoded = grid.decode(codes, params)
    assert torch.equal(grid.decode(grid.round(decoded, params), params), decoded)
    assert np.array_equal(grid.pack(codes, params).decode(), decoded.numpy())


@pytest.mark.parametrize("name", GRIDS)
def test_packed_tensor_decodes_to_the_same_floats(name):
    grid, (w, h) = Grid(name), sample()
    params = grid.fit(w, h)
    codes = grid.round(w, params)
    packed = grid.pack(codes, params)
    assert packed.scales.dtype == np.dtype(STORED_DTYPES[grid.spec.scale_dtype])
    scales, offsets = packed.group_parameters()
    assert np.array_equal(scales, params.scales.numpy()), "scales were already rounded"
    assert offsets is None or np.array_equal(offsets, params.offsets.numpy())
    assert np.array_equal(packed.decode(), grid.decode(codes, params).numpy())


def plain(grid, w):
    """Min-max (or absmax) parameters, the textbook choice."""
    blocks = w.view(len(w), -1, grid.spec.group_size)
    low, high = blocks.amin(-1), blocks.amax(-1)
    if grid.spec.kind == "symmetric":
        return GridParams(grid.store(blocks.abs().amax(-1) / (grid.spec.levels // 2 - 1)))
    if grid.spec.kind == "zero":
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = grid.store((high - low) / grid.top)
    return GridParams(scale, grid.store(grid._as_offset(scale, low)))


@pytest.mark.parametrize("name", [n for n in INTEGER if "8" not in n])
def test_search_beats_min_max_under_its_own_weights(name):
    grid, (w, h) = Grid(name), sample(64)
    a = h * (4 * w.square().mean(1, keepdim=True) + w.square()).sqrt()

    def loss(params):
        return float((a * (grid.decode(grid.round(w, params), params) - w).square()).sum())

    assert loss(grid.fit(w, h)) < 0.9 * loss(plain(grid, w))


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_1", "int4-g32-zero"])
def test_search_is_close_to_exhaustive(name):
    """A dense scan over scales (and offsets) of single blocks finds at most a few percent more."""
    grid, (w, _) = Grid(name), sample(16, 32, seed=1)
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    a = (4 * w.square().mean(1, keepdim=True) + w.square()).sqrt()

    def loss(params):
        return (a * (grid.decode(grid.round(w, params), params) - w).square()).sum(1)

    base, best = plain(grid, w), torch.full((16,), float("inf"))
    for factor in torch.linspace(0.6, 1.15, 111):
        for sign in (1, -1) if grid.spec.kind == "symmetric" else (1,):
            for shift in [0.0] if base.offsets is None else torch.linspace(-2, 2, 41):
                scale = base.scales * factor * sign
                offset = base.offsets
                if grid.spec.kind == "min":
                    offset = offset + shift * base.scales
                elif grid.spec.kind == "zero":
                    offset = (offset + shift.round()).clamp(0, grid.top)
                best = torch.minimum(best, loss(GridParams(scale, offset)))
    assert float((loss(grid.fit(w)) / best).mean()) < 1.03


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "int4-g32-zero", *TABLES])
def test_fit_does_not_depend_on_the_chunk(name, monkeypatch):
    (w, importance), grid = sample(), Grid(name)
    whole = grid.fit(w, importance)
    monkeypatch.setattr("optrot_edge.quantize.grids.CPU_CHUNK", 7)  # one row at a time
    parts = grid.fit(w, importance)
    assert torch.equal(whole.scales, parts.scales)
    assert whole.offsets is None or torch.equal(whole.offsets, parts.offsets)
    assert whole.stored.keys() == parts.stored.keys()
    assert all(torch.equal(whole.stored[name], parts.stored[name]) for name in whole.stored)


def test_exact_weights_are_reproduced():
    """Weights that already lie on a grid come back exactly."""
    generator = torch.Generator().manual_seed(0)
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        grid = Grid(name)
        codes = torch.randint(grid.spec.levels, (8, 64), generator=generator, dtype=torch.uint8)
        codes[:, ::32], codes[:, 1::32] = 0, grid.top
        scales = (torch.rand(8, 2, generator=generator) + 0.5).half().float()
        offsets = None if grid.spec.kind == "symmetric" else torch.randn(8, 2, generator=generator).half().float()
        w = grid.decode(codes, GridParams(scales, offsets))
        params = grid.fit(w)
        torch.testing.assert_close(grid.decode(grid.round(w, params), params), w, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bad", ["q1_k", "int9-g32-sym", "int4-g0-sym", "int4-g32-odd", "int4-g32-sym-f32", ""])
def test_unknown_grid(bad):
    with pytest.raises(InputError, match="unknown grid"):
        grid_spec(bad)


def test_width_and_overflow_are_refused():
    with pytest.raises(InputError, match="do not divide into groups of 32"):
        Grid("q4_0").fit(torch.ones(2, 40))
    with pytest.raises(InputError, match="overflow float16"):
        Grid("q4_0").fit(torch.full((2, 32), 1e9))
