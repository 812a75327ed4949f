"""GPTQ's arrays, read by an independent decoder, are the checkpoint's weights to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optrot_edge.checkpoint import QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.exporters.gptq_blocks import GPTQ_BITS, GPTQ_GROUPS, check_grid, check_shape, pack, unpack
from optrot_edge.gridspec import grid_spec
from optrot_edge.quantize.grids import Grid


def decode(parts: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """Weights float32 [out, in] by the layout's definition, one field at a time; zero-points are 1 more than stored."""
    (words, rows), fields, mask = parts["qweight"].shape, 32 // bits, 2**bits - 1
    weights = np.empty((rows, words * fields), np.float32)
    zeros = np.empty((len(parts["qzeros"]), rows), np.int64)
    for row in range(rows):
        zeros[:, row] = (parts["qzeros"][:, row // fields].astype(np.int64) >> bits * (row % fields) & mask) + 1
    for column in range(words * fields):
        codes = parts["qweight"][column // fields].astype(np.int64) >> bits * (column % fields) & mask
        group = parts["g_idx"][column]
        weights[:, column] = (codes - zeros[group]) * parts["scales"][group].astype(np.float32)
    return weights


def random_tensor(bits: int, group: int, kind: str, seed: int, groups: int = 2, lowest: int = 1) -> QuantizedTensor:
    """Random codes, zero-points and scales of either sign, some 0, on `int{bits}-g{group}-{kind}-f16`."""
    random, rows = np.random.default_rng(seed), 32
    spec = grid_spec(f"int{bits}-g{group}-{kind}-f16")
    codes = random.integers(spec.levels, size=(rows, groups * group), dtype=np.uint8)
    scales = (random.normal(size=(rows, groups)) * random.integers(2, size=(rows, groups))).astype(np.float16)
    zeros = random.integers(lowest, spec.levels, size=(rows, groups), dtype=np.uint8) if kind == "zero" else None
    return QuantizedTensor(spec, codes, scales, zeros)


@given(st.sampled_from(GPTQ_BITS), st.sampled_from(GPTQ_GROUPS), st.sampled_from(["sym", "zero"]),
       st.integers(1, 3), st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_arrays_are_the_weights(bits, group, kind, groups, seed):
    tensor = random_tensor(bits, group, kind, seed, groups)
    parts = pack(tensor)
    assert {name: (part.dtype.name, part.shape) for name, part in parts.items()} == {
        "qweight": ("int32", (groups * group * bits // 32, 32)), "qzeros": ("int32", (groups, bits)),
        "scales": ("float16", (groups, 32)), "g_idx": ("int32", (groups * group,))}
    assert np.array_equal(decode(parts, bits), tensor.decode())
    again = unpack(parts, tensor.spec).parts()
    assert all(np.array_equal(again[name], part) for name, part in tensor.parts().items())


@given(st.sampled_from(GPTQ_BITS), st.integers(0, 2**32))
@settings(deadline=None, max_examples=40)
def test_zero_points_of_0_move_with_their_codes(bits, seed):
    tensor = random_tensor(bits, 16, "zero", seed, lowest=0)
    tensor.offsets[::3] = 0
    groups = tensor.codes.reshape(32, 2, 16)
    groups -= ((tensor.offsets == 0)[..., None] & (groups == tensor.spec.levels - 1)).astype(np.uint8)
    parts = pack(tensor)
    assert np.array_equal(decode(parts, bits), tensor.decode())
    top = np.uint64(2**bits - 1)
    fields = parts["qzeros"].view(np.uint32).astype(np.uint64)[..., None] >> np.arange(0, 32, bits, dtype=np.uint64)
    assert (fields & top < top).all()  # adding 1 to the whole word carries nothing


@pytest.mark.parametrize("name", ["q4_0", "q8_0"])
def test_ggufs_symmetric_blocks_fit(name):
    bits = grid_spec(name).bits
    tensor = dataclasses.replace(random_tensor(bits, 32, "sym", 0), spec=grid_spec(name))
    assert np.array_equal(decode(pack(tensor), bits), tensor.decode())


def test_a_zero_point_of_0_that_cannot_move_is_refused():
    tensor = random_tensor(4, 32, "zero", 0)
    tensor.offsets[5, 1], tensor.codes[5, 40] = 0, 15
    with pytest.raises(InputError, match="q_proj .* zero-point 0 that needs all levels.* int4-g32-sym-f16"):
        pack(tensor, "q_proj")


@pytest.mark.parametrize("bits", GPTQ_BITS)
def test_fitted_zero_points_are_never_0(bits):
    """Not even of weights that are all positive or all 0."""
    grid = Grid(f"int{bits}-g16-zero-f16")
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).abs()
    weight[3] = 0
    params = grid.fit(weight)
    tensor = grid.pack(grid.round(weight, params), params)
    assert tensor.offsets.min() == 1
    assert np.array_equal(decode(pack(tensor), bits), tensor.decode())


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "int4-g32-sym", "int3-g32-sym-f16", "int4-g32-min-f16",
                                  "int4-g8-sym-f16", "int4-g96-zero-f16", "mlx-4bit-g64"])
def test_other_grids_are_refused(name):
    with pytest.raises(InputError, match="lm_head is on grid .* which GPTQ's format lacks; quantise to int"):
        check_grid(grid_spec(name), "lm_head")


@pytest.mark.parametrize("shape, says", [((64, 96), "groups of 64 .*; choose groups of 16 or 32"),
                                         ((64, 24), "choose f16"), ((100, 128), "multiples of 16 at 2 bits")])
def test_shapes_that_do_not_divide_are_refused(shape, says):
    with pytest.raises(InputError, match=says):
        check_shape(shape, grid_spec("int2-g64-sym-f16"), "q_proj")


def test_damage_is_refused():
    tensor = random_tensor(4, 32, "zero", 0)
    for change in ({"codes": tensor.codes | 16}, {"scales": tensor.scales[:, :1]}, {"offsets": None},
                   {"offsets": tensor.offsets | 16}, {"scales": tensor.scales.astype(np.float32)}):
        with pytest.raises(InputError, match="damaged"):
            pack(dataclasses.replace(tensor, **change))
    parts = pack(random_tensor(4, 32, "sym", 0))
    for change in ({"g_idx": parts["g_idx"][::-1]}, {"qzeros": parts["qzeros"] + 1}, {"scales": parts["scales"][:1]}):
        with pytest.raises(ValueError):
            unpack(parts | change, grid_spec("int4-g32-sym-f16"))
