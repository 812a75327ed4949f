"""QuantizedCheckpoint → MLX package: the frozen codes packed as they are, verified before the folder is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from optrot_edge.checkpoint import QuantizedCheckpoint, QuantizedTensor, check_replaceable, same_bits
from optrot_edge.errors import InputError, StorageError
from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer
from optrot_edge.exporters.mlx_blocks import pack, unpack
from optrot_edge.exporters.mlx_plan import MODEL_FILE, Plan, PlannedTensor, plan_mlx
from optrot_edge.exporters.model_card import model_card
from optrot_edge.exporters.safetensors_file import read_header, read_tensor, to_bfloat16, write_safetensors
from optrot_edge.journal import move_folder
from optrot_edge.models.config import ModelConfig

Progress = Callable[[int, int, str], None]
INDEX = "model.safetensors.index.json"


def export_mlx(checkpoint: QuantizedCheckpoint, out: str | Path, *, overwrite: bool = False,
               progress: Progress | None = None) -> dict:
    """Write `checkpoint` as the folder `out` that `mlx_lm.load` reads, one tensor in memory at a time, and verify it.

    `overwrite` replaces a package or an empty folder, nothing else; `progress` is called with (bytes done, bytes in
    all, what was done), where writing and verifying each count every byte once. Returns `path`, `bytes`, `weights`,
    `bits_per_weight` (all tensors over all weights), `tensors` (how many of the model's), `dtype` and `notes`.

    The folder is written as `out` + ".partial", read back and compared with the checkpoint, and renamed; whatever
    fails, Ctrl-C included, no partial folder stays. Raises InputError for bad input (see `plan_mlx`) or an output that
    cannot be written, RuntimeError if what was written is not the checkpoint.
    """
    out = Path(out)
    check_replaceable(out, overwrite, "MLX package", is_package)
    plan = plan_mlx(checkpoint)
    partial = out.absolute().with_name(out.absolute().name + ".partial")
    report = progress or (lambda done, total, what: None)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < plan.nbytes:
            raise StorageError(f"{out}: {plan.nbytes:,} bytes are needed and {free:,} are free; "
                               "choose another disk or fewer bits")
        _write(plan, checkpoint, partial, report)
        _verify(plan, checkpoint, partial, report)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        move_folder(partial, out)
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {"path": str(out), "bytes": size, "weights": plan.weights,
            "bits_per_weight": 8 * plan.nbytes / plan.weights, "tensors": len(plan.tensors), "dtype": plan.dtype,
            "notes": plan.notes}


def is_package(folder: Path) -> bool:
    """Whether this project wrote `folder`."""
    try:
        return "optrot" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _write(plan: Plan, checkpoint: QuantizedCheckpoint, folder: Path, report: Progress) -> None:
    done, weight_map = 0, {}
    for file, tensors in plan.shards().items():
        entries = {name: entry for tensor in tensors for name, entry in tensor.entries(plan.dtype).items()}

        def arrays(tensors: list[PlannedTensor] = tensors) -> Iterator[tuple[str, np.ndarray]]:
            nonlocal done
            for tensor in tensors:
                yield from _arrays(tensor, checkpoint, plan).items()
                done += plan.size_of(tensor)
                report(done, 2 * plan.nbytes, f"wrote {tensor.module}")

        write_safetensors(folder / file, entries, arrays(), {"format": "mlx"})
        weight_map |= dict.fromkeys(entries, file)
    index = {"metadata": {"total_size": plan.nbytes, "total_parameters": plan.weights},
             "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", dict(sorted(plan.config.items())))
    write_hf_tokenizer(checkpoint.path / "tokenizer", folder, ModelConfig.from_dict(checkpoint.manifest["model"]))
    if "model_file" in plan.config:
        shutil.copyfile(Path(__file__).with_name("mlx_model_file.py"), folder / MODEL_FILE)
    (folder / "README.md").write_text(model_card(plan.config, checkpoint.manifest, 8 * plan.nbytes / plan.weights),
                                      encoding="utf-8")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=4, allow_nan=False) + "\n", encoding="utf-8")


def _arrays(planned: PlannedTensor, checkpoint: QuantizedCheckpoint, plan: Plan) -> dict[str, np.ndarray]:
    """The package's arrays of a tensor, by name; InputError when the checkpoint's is damaged."""
    tensor = checkpoint.get(planned.source)
    if isinstance(tensor, QuantizedTensor):
        if tensor.spec != planned.spec or tensor.codes.shape != planned.shape:
            raise InputError(f"{planned.source} is {tensor.spec.name} {list(tensor.codes.shape)} instead of "
                             f"{planned.spec and planned.spec.name} {list(planned.shape)}; the checkpoint is damaged")
        return {f"{planned.module}.{part}": array for part, array in pack(tensor).items()}
    if tensor.shape != planned.shape or not np.isfinite(tensor).all():
        raise InputError(f"{planned.source}: wrong shape, NaN or infinity; the checkpoint is damaged")
    stored = _as_stored(tensor, plan.dtype)
    if plan.dtype == "float16" and not np.isfinite(stored).all():
        raise InputError(f"{planned.source} has weights beyond float16's range; choose --dtype bfloat16 or float32")
    return {f"{planned.module}.{planned.kind}": stored}


def _as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats in the package's dtype, bfloat16 as its bits."""
    with np.errstate(over="ignore"):  # the caller looks for infinity
        return to_bfloat16(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(dtype)


def _verify(plan: Plan, checkpoint: QuantizedCheckpoint, folder: Path, report: Progress) -> None:
    """RuntimeError unless config.json and every tensor read back as they are in the checkpoint, to the bit."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8")) != plan.config:
        raise RuntimeError(f"{folder}/config.json reads back differently from what was written")
    done = plan.nbytes
    for file, tensors in plan.shards().items():
        entries, starts = read_header(folder / file)
        for planned in tensors:
            wanted = planned.entries(plan.dtype)
            if any(entries.pop(name, None) != entry for name, entry in wanted.items()):
                raise RuntimeError(f"{folder}/{file}: {planned.module} is not as announced")
            read = {name: read_tensor(folder / file, entry, starts[name]) for name, entry in wanted.items()}
            if not _is_same(planned, read, checkpoint, plan):
                raise RuntimeError(f"{folder}/{file}: {planned.module} read back differently")
            done += plan.size_of(planned)
            report(done, 2 * plan.nbytes, f"verified {planned.module}")
        if entries:
            raise RuntimeError(f"{folder}/{file} holds {min(entries)}, which was not planned")


def _is_same(planned: PlannedTensor, read: dict[str, np.ndarray], checkpoint: QuantizedCheckpoint, plan: Plan) -> bool:
    expected = checkpoint.get(planned.source)
    if not isinstance(expected, QuantizedTensor):
        return same_bits(read[f"{planned.module}.{planned.kind}"], _as_stored(expected, plan.dtype))
    found = unpack({part: read[f"{planned.module}.{part}"] for part in ("weight", "scales", "biases")}, expected.spec)
    parts = found.parts()
    return all(same_bits(parts[name], part) for name, part in expected.parts().items())
