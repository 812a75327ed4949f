"""Read a written GGUF back and require that it is the checkpoint, weight for weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from optrot_edge.checkpoint import QuantizedCheckpoint, QuantizedTensor, same_bits
from optrot_edge.exporters.gguf_blocks import unpack
from optrot_edge.exporters.gguf_entries import read_entries, same_value
from optrot_edge.exporters.gguf_plan import Plan, PlannedTensor

_CHUNK = 1 << 22  # weights dequantised at a time


def verify_gguf(path: Path, checkpoint: QuantizedCheckpoint, plan: Plan, *,
                progress: Callable[[int, int, str], None] | None = None) -> None:
    """Compare every key and every tensor of the file at `path` with `plan` and `checkpoint`.

    Codes, scales, mins and integer scales must be equal (the row order of q and k undone), and gguf-py's own
    dequantiser must give exactly `QuantizedTensor.decode()`. Raises RuntimeError at the first
    difference: the export itself is at fault, not its input.
    """
    entries = read_entries(path)
    for key in entries.keys() | plan.entries.keys():
        if key not in entries or key not in plan.entries or not same_value(entries[key], plan.entries[key]):
            raise RuntimeError(f"{path}: key {key} reads back differently from what was written")
    reader = gguf.GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors]
    if names != [planned.name for planned in plan.tensors]:
        raise RuntimeError(f"{path}: the tensors read back are not those written")
    done = plan.nbytes
    for written, planned in zip(reader.tensors, plan.tensors, strict=True):
        difference = _difference(written, planned, checkpoint, plan)
        if difference:
            raise RuntimeError(f"{path}: {planned.name}: {difference} read back differently")
        done += planned.nbytes
        if progress:
            progress(done, 2 * plan.nbytes, f"verified {planned.name}")


def _difference(written: gguf.ReaderTensor, planned: PlannedTensor, checkpoint: QuantizedCheckpoint,
                plan: Plan) -> str | None:
    """What of the tensor is not as it should be, or None."""
    if written.tensor_type != planned.type or tuple(written.shape[::-1].tolist()) != planned.shape:
        return "type or shape"
    expected = checkpoint.get(planned.source) if planned.source else plan.rope_freqs
    order = planned.row_order()
    rows = slice(None) if order is None else np.argsort(order)  # file row of each Hugging Face row
    data = np.asarray(written.data)[rows]
    if planned.type.name == "BF16":
        return None if np.array_equal(gguf.quants.dequantize(data, planned.type), expected) else "values"
    if not isinstance(expected, QuantizedTensor):
        return None if np.array_equal(data, expected) else "values"
    found = unpack(data, expected.spec, planned.shape)
    parts = found.parts()
    for name, part in expected.parts().items():
        if not same_bits(parts[name], part):
            return name
    step = max(1, _CHUNK // planned.shape[1])
    for start in range(0, planned.shape[0], step):
        part = slice(start, start + step)
        if not np.array_equal(gguf.quants.dequantize(data[part], planned.type), expected.rows(part).decode()):
            return "dequantised weights"
    return None
