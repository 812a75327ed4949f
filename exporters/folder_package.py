"""Packages that are folders of a Hugging Face model's form: config.json, safetensors in shards with their index, the
tokenizer and a card. What a format packs, it says in its FolderPlan; how a package is written, read back, compared and
renamed is here.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import ClassVar

import numpy as np

from optrot_edge.checkpoint import QuantizedCheckpoint, QuantizedTensor, check_replaceable, same_bits
from optrot_edge.errors import InputError, StorageError
from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer
from optrot_edge.exporters.safetensors_file import Entry, read_header, read_tensor, to_bfloat16, write_safetensors
from optrot_edge.gridspec import GridSpec
from optrot_edge.journal import move_folder
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX, Family
from optrot_edge.models.optrot_entry import FORMAT_VERSION

Progress = Callable[[int, int, str], None]
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # as transformers 4 and mlx-lm cut them
ENTRY_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_KEPT = ("rotation", "rotate", "quantizer", "calibration", "nsamples", "seqlen", "seed", "distill")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the checkpoint (`source`) and where it goes: `module` is its Hugging Face name without the suffix
    `kind`; `spec` its grid, None for a float tensor."""

    source: str
    module: str
    kind: str
    shape: tuple[int, ...]
    spec: GridSpec | None


@dataclass
class PackagePlan(ABC):
    """A package before any byte: config.json, the dtype of its floats, the tensors, remarks (`notes`)."""

    config: dict
    dtype: str
    tensors: list[PlannedTensor]
    notes: list[str] = field(default_factory=list)

    too_large: ClassVar[str]  # what to do about weights beyond the range of `dtype`

    @abstractmethod
    def size_of(self, tensor: PlannedTensor) -> int:
        """Bytes of a tensor in the package."""

    @property
    def weights(self) -> int:
        """Number of the model's weights."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(self.size_of, self.tensors))

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors over all weights."""
        return 8 * self.nbytes / self.weights


class FolderPlan(PackagePlan):
    """A package of safetensors, its tensors in file order.

    A format's own: the names and shapes of a quantised matrix's arrays, packing them, and comparing them.
    """

    metadata: ClassVar[dict[str, str]] = {"format": "pt"}  # of every safetensors file

    @abstractmethod
    def packed_entries(self, shape: tuple[int, ...], spec: GridSpec) -> dict[str, Entry]:
        """A quantised matrix's arrays by the suffix of their names."""

    @abstractmethod
    def pack(self, tensor: QuantizedTensor, name: str) -> dict[str, np.ndarray]:
        """The same with their data; InputError, with the checkpoint's `name` of it, for what cannot be packed."""

    @abstractmethod
    def is_same(self, parts: dict[str, np.ndarray], expected: QuantizedTensor) -> bool:
        """Whether what was read back is `expected` to the bit."""

    @abstractmethod
    def card(self, manifest: dict) -> str:
        """README.md."""

    def entries(self, tensor: PlannedTensor) -> dict[str, Entry]:
        """The package's arrays of a tensor, by name."""
        if tensor.spec is None:
            return {f"{tensor.module}.{tensor.kind}": Entry(ENTRY_DTYPES[self.dtype], tensor.shape)}
        return {f"{tensor.module}.{part}": entry
                for part, entry in self.packed_entries(tensor.shape, tensor.spec).items()}

    def size_of(self, tensor: PlannedTensor) -> int:
        """Bytes of a tensor in the package."""
        return sum(entry.nbytes for entry in self.entries(tensor).values())

    def shards(self) -> dict[str, list[PlannedTensor]]:
        """Tensors by file name; a file holds at most SHARD_BYTES, or one tensor."""
        parts, size = [[]], 0
        for tensor in self.tensors:
            if parts[-1] and size + self.size_of(tensor) > SHARD_BYTES:
                parts.append([])
                size = 0
            parts[-1].append(tensor)
            size += self.size_of(tensor)
        if len(parts) == 1:
            return {"model.safetensors": parts[0]}
        return {f"model-{index:05d}-of-{len(parts):05d}.safetensors": part for index, part in enumerate(parts, 1)}


def planned_tensors(family: Family, shapes: dict[str, tuple[int, ...]],
                    specs: dict[str, GridSpec | None]) -> list[PlannedTensor]:
    """Tensors in the order of the files, from canonical names."""
    tensors = []
    for name, shape in shapes.items():
        module, _, kind = (name if name == HEAD_MIX else family.hf_name(name)).rpartition(".")
        tensors.append(PlannedTensor(name, module, kind, shape, specs[name]))
    return sorted(tensors, key=lambda tensor: not tensor.source.startswith("layers."))  # makes a smaller header


def package_dtype(checkpoint: QuantizedCheckpoint, specs: dict[str, GridSpec | None], format: str,
                  default: str) -> str:
    """The one dtype of all scales, or what the recipe says where nothing is quantised."""
    found = {spec.scale_dtype for spec in specs.values() if spec is not None}
    if len(found) > 1:
        raise InputError(f"{checkpoint.path} holds scales of {' and '.join(sorted(found))}; {format.upper()} packages "
                         f"have one dtype: quantise again with --format {format} and --dtype")
    recipe = checkpoint.manifest.get("recipe") or {}
    return found.pop() if found else recipe.get("dtype") or default


def provenance(manifest: dict, config: ModelConfig, format: str) -> dict:
    """config.json's "optrot": what the package was made by, and what its runtime must do."""
    rotation, recipe = manifest.get("rotation") or {}, manifest.get("recipe") or {}
    return {"format_version": FORMAT_VERSION, "format": format,
            "version": (manifest.get("versions") or {}).get("optrot-edge"),
            "rotation": rotation.get("rotation"), "applied": rotation.get("applied", []),
            "scales": rotation.get("scales", []), "r3_block": rotation.get("r3_block"),
            "r4_block": rotation.get("r4_block"), "head_mix": config.head_mix,
            "recipe": {name: recipe[name] for name in _KEPT if name in recipe},
            "calibration_sha256": manifest.get("calibration_sha256"), "warnings": manifest.get("warnings", [])}


def is_package(folder: Path, format: str) -> bool:
    """Whether this project wrote `folder` as a package of `format`."""
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("optrot")
        return isinstance(about, dict) and about.get("format") == format
    except (OSError, ValueError, AttributeError):
        return False


def check_place(out: Path, overwrite: bool, format: str) -> None:
    """InputError when a package of `format` cannot be put at `out`; `overwrite` replaces one, or an empty folder."""
    check_replaceable(out, overwrite, f"{format.upper()} package", lambda folder: is_package(folder, format))


def make_folder(out: Path, nbytes: int, fill: Callable[[Path], None]) -> int:
    """Let `fill` write and verify a folder of at least `nbytes`, and put it at `out`; its size in bytes.

    It is written as `out` + ".partial" and renamed; whatever fails, Ctrl-C included, no partial folder stays. Raises
    StorageError when the disk refuses.
    """
    partial = out.absolute().with_name(out.absolute().name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < nbytes:
            raise StorageError(f"{out}: {nbytes:,} bytes are needed and {free:,} are free; "
                               "choose another disk or fewer bits")
        fill(partial)
        size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        move_folder(partial, out)
        return size
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_package(plan: FolderPlan, checkpoint: QuantizedCheckpoint, out: Path, progress: Progress | None,
                  files: dict[str, Path] | None = None) -> dict:
    """Write what is planned as the folder `out`, one tensor in memory at a time; the summary that exporters return.

    `progress` is called with (bytes done, bytes in all, what was done), where writing and verifying each count every
    byte once; `files` are to be copied into the package, by their names there. Raises InputError for a damaged
    checkpoint and weights out of range, StorageError when the disk refuses, RuntimeError if what was written is not
    the checkpoint; see `make_folder`.
    """
    report = progress or (lambda done, total, what: None)

    def fill(folder: Path) -> None:
        _write(plan, checkpoint, folder, report)
        for name, source in (files or {}).items():
            shutil.copyfile(source, folder / name)
        _verify(plan, checkpoint, folder, report)

    return summary(plan, out, make_folder(out, plan.nbytes, fill))


def summary(plan: PackagePlan, out: Path, size: int) -> dict:
    """What exporters return of a package of `size` bytes."""
    return {"path": str(out), "bytes": size, "weights": plan.weights, "bits_per_weight": plan.bits_per_weight,
            "tensors": len(plan.tensors), "dtype": plan.dtype, "notes": plan.notes}


def _write(plan: FolderPlan, checkpoint: QuantizedCheckpoint, folder: Path, report: Progress) -> None:
    done, weight_map = 0, {}
    for file, tensors in plan.shards().items():
        entries = {name: entry for tensor in tensors for name, entry in plan.entries(tensor).items()}

        def arrays(tensors: list[PlannedTensor] = tensors) -> Iterator[tuple[str, np.ndarray]]:
            nonlocal done
            for tensor in tensors:
                yield from _arrays(tensor, checkpoint, plan).items()
                done += plan.size_of(tensor)
                report(done, 2 * plan.nbytes, f"wrote {tensor.module}")

        write_safetensors(folder / file, entries, arrays(), plan.metadata)
        weight_map |= dict.fromkeys(entries, file)
    index = {"metadata": {"total_size": plan.nbytes, "total_parameters": plan.weights},
             "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)
    _write_json(folder / "config.json", dict(sorted(plan.config.items())))
    write_hf_tokenizer(checkpoint.path / "tokenizer", folder, ModelConfig.from_dict(checkpoint.manifest["model"]))
    (folder / "README.md").write_text(plan.card(checkpoint.manifest), encoding="utf-8")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=4, allow_nan=False) + "\n", encoding="utf-8")


def load_checked(planned: PlannedTensor, checkpoint: QuantizedCheckpoint,
                 plan: PackagePlan) -> QuantizedTensor | np.ndarray:
    """A checkpoint's tensor, floats as the package stores them; InputError when it is damaged or out of range."""
    tensor = checkpoint.get(planned.source)
    if isinstance(tensor, QuantizedTensor):
        if tensor.spec != planned.spec or tensor.codes.shape != planned.shape:
            raise InputError(f"{planned.source} is {tensor.spec.name} {list(tensor.codes.shape)} instead of "
                             f"{planned.spec and planned.spec.name} {list(planned.shape)}; the checkpoint is damaged")
        return tensor
    if tensor.shape != planned.shape or not np.isfinite(tensor).all():
        raise InputError(f"{planned.source}: wrong shape, NaN or infinity; the checkpoint is damaged")
    stored = _as_stored(tensor, plan.dtype)
    if plan.dtype == "float16" and not np.isfinite(stored).all():
        raise InputError(f"{planned.source} has weights beyond float16's range; {plan.too_large}")
    return stored


def _arrays(planned: PlannedTensor, checkpoint: QuantizedCheckpoint, plan: FolderPlan) -> dict[str, np.ndarray]:
    """The package's arrays of a tensor, by name; InputError when the checkpoint's is damaged."""
    tensor = load_checked(planned, checkpoint, plan)
    if isinstance(tensor, QuantizedTensor):
        return {f"{planned.module}.{part}": array for part, array in plan.pack(tensor, planned.source).items()}
    return {f"{planned.module}.{planned.kind}": tensor}


def _as_stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Floats in the package's dtype, bfloat16 as its bits."""
    with np.errstate(over="ignore"):  # the caller looks for infinity
        return to_bfloat16(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(dtype)


def _verify(plan: FolderPlan, checkpoint: QuantizedCheckpoint, folder: Path, report: Progress) -> None:
    """RuntimeError unless config.json and every tensor read back as they are in the checkpoint, to the bit."""
    if json.loads((folder / "config.json").read_text(encoding="utf-8")) != plan.config:
        raise RuntimeError(f"{folder}/config.json reads back differently from what was written")
    done = plan.nbytes
    for file, tensors in plan.shards().items():
        entries, starts = read_header(folder / file)
        for planned in tensors:
            wanted = plan.entries(planned)
            if any(entries.pop(name, None) != entry for name, entry in wanted.items()):
                raise RuntimeError(f"{folder}/{file}: {planned.module} is not as announced")
            read = {name.removeprefix(f"{planned.module}."): read_tensor(folder / file, entry, starts[name])
                    for name, entry in wanted.items()}
            if not _is_same(planned, read, checkpoint.get(planned.source), plan):
                raise RuntimeError(f"{folder}/{file}: {planned.module} read back differently")
            done += plan.size_of(planned)
            report(done, 2 * plan.nbytes, f"verified {planned.module}")
        if entries:
            raise RuntimeError(f"{folder}/{file} holds {min(entries)}, which was not planned")


def _is_same(planned: PlannedTensor, read: dict[str, np.ndarray], expected: QuantizedTensor | np.ndarray,
             plan: FolderPlan) -> bool:
    if isinstance(expected, QuantizedTensor):
        return plan.is_same(read, expected)
    return same_bits(read[planned.kind], _as_stored(expected, plan.dtype))
