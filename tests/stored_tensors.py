"""Random tensors as checkpoints store them, on any grid."""

from __future__ import annotations

import numpy as np

from optrot_edge.checkpoint import QuantizedTensor, grid_spec
from optrot_edge.gridspec import STORED_DTYPES

EXTREMES = np.array([0, -0.0, 65504, -65504, 6e-8, -6e-8, 6.1e-5, 1, -1], np.float16)  # 6e-8: subnormal


def random_tensor(grid: str, rows: int, blocks: int, seed: int = 0) -> QuantizedTensor:
    """Every code and integer scale equally likely, some blocks all lowest or highest; scales of any sign and size."""
    rng, spec = np.random.default_rng(seed), grid_spec(grid)
    shape, groups = (rows, blocks), (rows, blocks * spec.block_size // spec.group_size)
    codes = rng.integers(0, spec.levels, (rows, blocks, spec.block_size), np.uint8)
    codes[rng.random(shape) < 0.1] = 0
    codes[rng.random(shape) < 0.1] = spec.levels - 1

    def floats():
        values = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-6, 2)).astype(np.float16)
        values = np.where(rng.random(shape) < 0.3, rng.choice(EXTREMES, shape), values)
        if spec.scale_dtype == "e8m0":
            return rng.integers(0, 253, shape, np.uint8)  # above, weights overflow float32
        if spec.scale_dtype == "bfloat16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(STORED_DTYPES[spec.scale_dtype])

    offsets = {"min": floats, "zero": lambda: rng.integers(0, spec.levels, shape, np.uint8)}.get(spec.kind)
    parts = {"scales": floats(), "offsets": offsets and offsets()}
    if spec.subscales:
        low, high = spec.subscales
        names = ["subscales", "suboffsets"] if spec.kind == "min" else ["subscales"]
        parts |= {name: rng.integers(low, high, groups, spec.subscale_dtype, endpoint=True) for name in names}
    return QuantizedTensor(spec, codes.reshape(rows, -1), **parts)
