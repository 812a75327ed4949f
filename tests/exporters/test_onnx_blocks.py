"""ONNX Runtime's own MatMulNBits multiplies by exactly the weights that the checkpoint decodes to."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

from optrot_edge.errors import InputError
from optrot_edge.exporters.onnx_blocks import check_grid, pack, unpack
from optrot_edge.gridspec import grid_spec
from optrot_edge.quantize.grids import Grid

GRIDS = [f"int{bits}-g{group}-{kind}" for bits in (2, 4, 8) for group in (16, 32, 64, 128, 256)
         for kind in ("sym", "zero")]


def quantised(name: str, columns: int):
    """A matrix [7, columns] on that grid, with a row of zeros, an outlier and a row that is not centred."""
    weight = torch.randn(7, columns, generator=torch.Generator().manual_seed(1))
    weight[1], weight[2, 7] = 0, 30.0
    weight[3] += 2.0
    grid = Grid(name)
    params = grid.fit(weight)
    return grid.pack(grid.round(weight, params), params)


def multiply(tensor, x: np.ndarray, **attributes) -> np.ndarray:
    """`x Wᵀ` in ONNX Runtime on the CPU."""
    parts, (rows, columns) = pack(tensor), tensor.codes.shape
    node = helper.make_node("MatMulNBits", ["A", *parts], ["Y"], domain="com.microsoft", K=columns, N=rows,
                            bits=tensor.spec.bits, block_size=tensor.spec.group_size, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph([node], "product", [helper.make_tensor_value_info("A", kind, x.shape)],
                              [helper.make_tensor_value_info("Y", kind, [len(x), rows])],
                              [numpy_helper.from_array(part, name) for name, part in parts.items()])
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString(), options,
        providers=["CPUExecutionProvider"])
    return session.run(None, {"A": x})[0]


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("name", GRIDS)
def test_matmulnbits_decodes_what_was_packed(name, level):
    """The product with the identity is the weights, exactly; an odd number of blocks leaves padding behind the
    zero-points."""
    tensor = quantised(name, 3 * grid_spec(name).group_size)
    found = multiply(tensor, np.eye(tensor.codes.shape[1], dtype=np.float32), accuracy_level=level)
    assert np.array_equal(found.T, tensor.decode())


@pytest.mark.parametrize("name", ["int2-g32-sym-f16", "int4-g128-zero-f16", "int8-g64-zero-f16"])
def test_float16_scales(name):
    """With float16 activations the weights are the decoded ones, rounded once."""
    tensor = quantised(name, 384)
    assert tensor.scales.dtype == np.float16
    found = multiply(tensor, np.eye(384, dtype=np.float16))
    assert np.array_equal(found.T, tensor.decode().astype(np.float16))


def test_level_four_rounds_the_activations():
    """int8 activations cost accuracy in products, though none of the weights' own."""
    tensor, x = quantised("int4-g32-zero", 256), np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32)
    exact = x @ tensor.decode().T
    errors = [np.abs(multiply(tensor, x, accuracy_level=level) - exact).max() for level in (1, 4)]
    assert errors[0] < 1e-4 < errors[1] < 2.0


@pytest.mark.parametrize("name", GRIDS)
def test_unpack_is_the_inverse(name):
    tensor = quantised(name, 256 * 3)
    again = unpack(pack(tensor), tensor.spec)
    assert np.array_equal(again.codes, tensor.codes) and np.array_equal(again.decode(), tensor.decode())


@pytest.mark.parametrize("name", ["q4_1", "int3-g32-sym", "int4-g32-min", "int4-g8-sym", "int4-g96-zero", "q4_k"])
def test_other_grids_are_refused(name):
    with pytest.raises(InputError, match="lm_head is on grid .* which ONNX's MatMulNBits lacks"):
        check_grid(grid_spec(name), "lm_head")


def test_damage_is_refused():
    tensor = quantised("int4-g32-zero", 96)
    for change in ({"codes": tensor.codes | 16}, {"scales": tensor.scales[:, :1]}, {"offsets": None},
                   {"offsets": tensor.offsets | 16}):
        with pytest.raises(InputError, match="below 16|scales|zero-points"):
            pack(dataclasses.replace(tensor, **change))
