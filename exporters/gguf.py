"""QuantizedCheckpoint → GGUF: the frozen codes packed as they are, verified before the file is named."""

from __future__ import annotations

import dataclasses
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
from optrot_edge.exporters.gguf_split import split_plan
from optrot_edge.exporters.gguf_verify import verify_gguf
from optrot_edge.gridspec import encode_scales
from optrot_edge.journal import Lock
from optrot_edge.models.gguf_parts import move_set, outputs, part_path

Progress = Callable[[int, int, str], None]


def export_gguf(checkpoint: QuantizedCheckpoint, out: str | Path, *, name: str | None = None,
                vocab_from: Path | None = None, split_max_size: int | None = None, overwrite: bool = False,
                check: Callable[[Entries], list[str]] | None = None, progress: Progress | None = None) -> dict:
    """Write `checkpoint` as the GGUF file `out`, one tensor in memory at a time, and verify it.

    `name` becomes general.name; `vocab_from` is a GGUF whose vocabulary to copy; a file larger than `split_max_size`
    bytes becomes several, `NAME-00001-of-00003.gguf` and so on for an `out` of `NAME.gguf`; `check` is
    called with the file's keys before it is written, may raise, and returns notes; `progress` is
    called with (bytes done, bytes in all, what was done), where writing and verifying each count
    every byte once. Returns `path` (of a split GGUF its first part), `parts`, `bytes`, `weights`, `bits_per_weight`
    (all tensors over all weights), `tensors` (how many), `file_type` and `notes`.

    The files are written into the folder `out` + ".partial", decoded again and compared with the checkpoint, and
    moved; whatever fails, Ctrl-C included, none stays. Raises InputError for bad
    input (see `plan_gguf`), an output that cannot be written or that another process is writing, RuntimeError if a
    file written is not the checkpoint.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} exists and is a folder; --out must name a file")
    check_free(out, overwrite)
    plan = plan_gguf(checkpoint, name=name, vocab_from=vocab_from)
    plan.notes += check(plan.entries) if check else []
    plans = [plan]
    if split_max_size is not None:
        plans = split_plan(plan, split_max_size, metadata_bytes(dataclasses.replace(plan, tensors=[])))
    with Lock(out.with_name(out.name + ".partial.lock")):
        check_free(out, overwrite)  # nobody else made it meanwhile
        files, size = _write_all(plans, checkpoint, out, progress or (lambda done, total, what: None))
    return {"path": str(files[0]), "parts": len(files), "bytes": size, "weights": plan.weights,
            "bits_per_weight": 8 * plan.nbytes / plan.weights, "tensors": len(plan.tensors),
            "file_type": plan.file_type.name, "notes": plan.notes}


def check_free(out: Path, overwrite: bool) -> None:
    """InputError when the GGUF `out`, or parts of one of that name, are there and may not be replaced."""
    if not overwrite and (taken := outputs(out)):
        raise InputError(f"{taken[0]} exists; choose another --out or pass --overwrite")


def _write_all(plans: list[Plan], checkpoint: QuantizedCheckpoint, out: Path, report: Progress) -> tuple[
        list[Path], int]:
    """Write, verify and move the files of `plans`; where they lie, and their bytes."""
    partial, total, done = out.with_name(out.name + ".partial"), sum(plan.nbytes for plan in plans), 0
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < total:
            raise StorageError(f"{out}: {total:,} bytes are needed and {free:,} are free; "
                               "choose another disk or a smaller type")
        paths = [partial / (part_path(out, i, len(plans)) if len(plans) > 1 else out).name for i in range(len(plans))]
        for plan, path in zip(plans, paths, strict=True):
            def step(part_done: int, _, what: str, before: int = done) -> None:
                report(before + part_done, 2 * total, what)

            write_gguf(plan, checkpoint, path, step)
            verify_gguf(path, checkpoint, plan, progress=step)
            done += 2 * plan.nbytes
        size = sum(path.stat().st_size for path in paths)
        move_set(partial, out)
    except OSError as error:
        # numpy's tofile gives no error number, only how much of an array it could write
        reason = error if error.errno else f"the disk is full, or a limit on the size of files is reached ({error})"
        raise StorageError(f"{out} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [out.with_name(path.name) for path in paths], size


def tensor_data(planned: PlannedTensor, checkpoint: QuantizedCheckpoint, plan: Plan) -> np.ndarray:
    """What the file holds of one tensor: uint8 blocks (of bfloat16: bytes) [out, row bytes], or float32/float16
    values."""
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
    if planned.type.name == "BF16":
        tensor = encode_scales(tensor, "bfloat16").view(np.uint8)
    else:
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
        more = 1024  # keys that say how it was made, and an output.weight, if a rotation unties it
        return path.stat().st_size + writer.data_alignment * (len(plan.tensors) + 2) + more


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
    writer.kv_data[0].clear()  # the constructor has put the architecture there, which only a first part has
    for key, entry in plan.entries.items():
        writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    for planned in plan.tensors:
        writer.add_tensor_info(planned.name, planned.shape, np.dtype(np.float32), planned.nbytes,
                               raw_dtype=planned.type)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

