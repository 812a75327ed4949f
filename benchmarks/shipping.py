"""Files as they would ship: the same body with embedding and head in the types a user would choose.

The benchmark's arms keep embedding and head in F16 so that only the body is compared. A shipped file
cannot: a matrix of vocabulary × hidden is a fifth of SmolLM2. Unrotated it is stored once, read as
embedding and as head. R1 unties the two (the final norm's gain is folded into the head), so a rotated
file holds it twice, and must pay for that in bytes. `VARIANTS` are the choices measured.
"""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import torch
from testbed import copy_metadata

from optrot_edge.exporters.gguf_blocks import pack
from optrot_edge.quantize.grids import Grid

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# (embedding, head) per arm; one entry when tied. A row lookup bears fewer bits than the head does.
VARIANTS = {True: [("q8_0",), ("q5_0",)], False: [("q4_0", "q8_0"), ("q4_0", "q5_0")]}


def is_tied(model: str | Path) -> bool:
    """Whether a GGUF stores one matrix for embedding and head."""
    return HEAD not in {tensor.name for tensor in gguf.GGUFReader(model).tensors}


def ship(model: str | Path, types: tuple[str, ...], out: str | Path) -> Path:
    """Copy GGUF `model` to `out` with its F16 embedding (and head) on the grids `types`.

    Every other tensor is copied byte for byte. The scales are fitted as the quantiser fits those of
    an embedding: least squares without calibration data.
    """
    reader = gguf.GGUFReader(model)
    chosen = dict(zip((EMBEDDING, HEAD), types, strict=False))
    out = Path(out)
    partial = out.with_suffix(".partial")
    try:
        writer = gguf.GGUFWriter(partial, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
        copy_metadata(reader, writer)
        for tensor in reader.tensors:
            data, kind = tensor.data, tensor.tensor_type
            if tensor.name in chosen:
                data, kind = _quantise(data, chosen[tensor.name])
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return out


def _quantise(weights: np.ndarray, name: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Float weights [out, in] as blocks of that type."""
    grid = Grid(name)
    weights = torch.from_numpy(weights.astype(np.float32))
    params = grid.fit(weights)
    blocks = pack(grid.pack(grid.round(weights, params), params))
    return np.ascontiguousarray(blocks), gguf.GGMLQuantizationType[name.upper()]
