"""QuantizedCheckpoint → GGUF: the frozen codes packed as they are, verified before the file is named."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from optrot_edge.checkpoint import QuantizedCheckpoint, QuantizedTensor
from optrot_edge.errors import InputError, StorageError
from optrot_edge.exporters.gguf_blocks import pack
from optrot_edge.exporters.gguf_entries import Entries
from optrot_edge.exporters.gguf_plan import Plan, PlannedTensor, plan_gguf
from optrot_edge.exporters.gguf_verify import verify_gguf

Progress = Callable[[int, int, str], None]


def export_gguf(checkpoint: QuantizedCheckpoint, out: str | Path, *, name: str | None = None,
                vocab_from: Path | None = None, overwrite: bool = False,
                check: Callable[[Entries], list[str]] | None = None, progress: Progress | None = None) -> dict:
    """Write `checkpoint` as the GGUF file `out`, one tensor in memory at a time, and verify it.

    `name` becomes general.name; `vocab_from` is a GGUF whose vocabulary to copy; `check` is
    called with the file's keys before it is written, may raise, and returns notes; `progress` is
    called with (bytes done, bytes in all, what was done), where writing and verifying each count
    every byte once. Returns `path`, `bytes`, `weights`, `bits_per_weight` (all tensors over all
    weights), `tensors` (how many), `file_type` and `notes`.

    The file is written as `out` + ".partial", decoded again and compared with the checkpoint, and
    renamed; whatever fails, Ctrl-C included, no partial file stays. Raises InputError for bad
    input (see `plan_gguf`) or an output that cannot be written, RuntimeError if the file written
    is not the checkpoint.
    """
    out = Path(out)
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"{out} exists; choose another --out or pass --overwrite")
    plan = plan_gguf(checkpoint, name=name, vocab_from=vocab_from)
    plan.notes += check(plan.entries) if check else []
    partial = out.with_name(out.name + ".partial")
    report = progress or (lambda done, total, what: None)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < plan.nbytes:
            raise StorageError(f"{out}: {plan.nbytes:,} bytes are needed and {free:,} are free; "
                               "choose another disk or a smaller type")
        write_gguf(plan, checkpoint, partial, report)
        size = partial.stat().st_size
        verify_gguf(partial, checkpoint, plan, progress=report)
        os.replace(partial, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    finally:
        _remove(partial)
    return {"path": str(out), "bytes": size, "weights": plan.weights,
            "bits_per_weight": 8 * plan.nbytes / plan.weights, "tensors": len(plan.tensors),
            "file_type": plan.file_type.name, "notes": plan.notes}


def tensor_data(planned: PlannedTensor, checkpoint: QuantizedCheckpoint, plan: Plan) -> np.ndarray:
    """What the file holds of one tensor: uint8 blocks [out, row bytes], or float32/float16 values."""
    if not planned.source:
        return plan.rope_freqs
    tensor, order = checkpoint.get(planned.source), planned.row_order()
    if isinstance(tensor, QuantizedTensor):
        if tensor.codes.shape != planned.shape:
            raise InputError(f"{planned.source} is {list(tensor.codes.shape)} and should be "
                             f"{list(planned.shape)}; the checkpoint is damaged")
        blocks = pack(tensor)
        return blocks if order is None else blocks[order]  # a row's blocks move with it
    if tensor.shape != planned.shape or not np.isfinite(tensor).all():
        raise InputError(f"{planned.source}: wrong shape, NaN or infinity; the checkpoint is damaged")
    tensor = tensor.astype(np.float16 if planned.type.name == "F16" else np.float32)
    return np.ascontiguousarray(tensor if order is None else tensor[order])


def metadata_bytes(plan: Plan) -> int:
    """Bytes of a file that are not tensors, at most: header, keys, tensor list, padding."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(None, plan.arch)
        try:
            _write_header(writer, plan, path)
            writer.flush()
        finally:
            writer.close()
        one_more = 256  # an output.weight, if a rotation unties it
        return path.stat().st_size + writer.data_alignment * (len(plan.tensors) + 2) + one_more


def write_gguf(plan: Plan, checkpoint: QuantizedCheckpoint, path: Path, report: Progress) -> None:
    """Write the planned file: header, keys and tensor list first, then one tensor after another."""
    writer = GGUFWriter(None, plan.arch)
    try:
        _write_header(writer, plan, path)
        done = 0
        for planned in plan.tensors:
            writer.write_tensor_data(tensor_data(planned, checkpoint, plan))
            done += planned.nbytes
            report(done, 2 * plan.nbytes, f"wrote {planned.name}")
        writer.flush()
        os.fsync(writer.fout[0].fileno())
    finally:
        writer.close()


def _write_header(writer: GGUFWriter, plan: Plan, path: Path) -> None:
    for key, entry in plan.entries.items():
        if key != "general.architecture":  # the writer's constructor has set it
            writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    for planned in plan.tensors:
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes,
                               raw_dtype=planned.type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _remove(path: Path) -> None:
    """Delete a partial file if it could be created at all."""
    if path.is_file():
        path.unlink()
