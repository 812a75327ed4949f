"""QuantizedCheckpoint: codes, stored-precision scales and a manifest; all that exporters read.

A folder holding `optrot.json` (the manifest) and safetensors files, one per decoder layer and one
for the rest. A quantised tensor `NAME` is stored as `NAME.codes` (uint8 [out, in]),
`NAME.scales` and, for grids with an offset, `NAME.mins` or `NAME.zeros` ([out, in / block_size]); grids of
two levels (K-quants) have integers `NAME.subscales` and `NAME.submins` ([out, in / group_size]) besides.
Scales and mins already have the precision that the target format stores (bfloat16 and E8M0 as their bits).
A float tensor is stored under its own name. What calibration saw is kept beside them, in `inputs-` + the file's name:
`NAME.in_sum2`, float32 [in], the sums of the squared inputs of a matrix, and `NAME.counts`, float32 [1], over how many
tokens. Needs numpy and safetensors only.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from optrot_edge.errors import InputError, StorageError
from optrot_edge.gridspec import FLOAT_TYPES, GGUF_GRIDS, STORED_DTYPES, GridSpec, decode_scales, grid_spec
from optrot_edge.journal import move_folder, restore_folder

__all__ = ["FLOAT_TYPES", "GGUF_GRIDS", "MANIFEST", "CheckpointWriter", "GridSpec", "InputSums", "NoWriter",
           "QuantizedCheckpoint", "QuantizedTensor", "chosen_by_auto", "grid_spec"]
MANIFEST = "optrot.json"
FORMAT_VERSION = 1


@dataclass
class QuantizedTensor:
    """Codes uint8 [out, in] on `spec`'s grid and its parameters as stored.

    `scales` and `offsets` (mins or zero-points) are [out, in / block_size], in `spec`'s stored dtype; grids with two
    levels have integer `subscales` and (kind "min") `suboffsets` [out, in / group_size] besides.
    """

    spec: GridSpec
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None
    subscales: np.ndarray | None = None
    suboffsets: np.ndarray | None = None

    def parts(self) -> dict[str, np.ndarray]:
        """What is stored, by the suffix of its name in the checkpoint."""
        spec = self.spec
        named = {"codes": self.codes, "scales": self.scales, "subscales": self.subscales}
        if spec.offset_name:
            named |= {spec.offset_name: self.offsets, f"sub{spec.offset_name}": self.suboffsets}
        return {name: part for name, part in named.items() if part is not None}

    def _arrays(self) -> tuple[np.ndarray | None, ...]:
        return self.codes, self.scales, self.offsets, self.subscales, self.suboffsets

    def rows(self, rows: slice) -> QuantizedTensor:
        """The tensor of some rows."""
        return QuantizedTensor(self.spec, *(None if part is None else part[rows] for part in self._arrays()))

    @classmethod
    def join(cls, tensors: list[QuantizedTensor]) -> QuantizedTensor:
        """Row chunks of one matrix put together again."""
        columns = zip(*(tensor._arrays() for tensor in tensors), strict=True)
        return cls(tensors[0].spec, *(None if parts[0] is None else np.concatenate(parts) for parts in columns))

    def group_parameters(self) -> tuple[np.ndarray, np.ndarray | None]:
        """float32 scale and offset [out, in / group_size] of every group."""
        scales, offsets = decode_scales(self.scales, self.spec.scale_dtype), self.offsets
        if offsets is not None:
            offsets = (offsets.astype(np.float32) if self.spec.kind == "zero"
                       else decode_scales(offsets, self.spec.scale_dtype))
        if self.subscales is None:
            return scales, offsets
        repeats = self.spec.block_size // self.spec.group_size
        scales = np.repeat(scales, repeats, 1) * self.subscales.astype(np.float32)
        if offsets is not None:
            offsets = -(np.repeat(offsets, repeats, 1) * self.suboffsets.astype(np.float32))
        return scales, offsets

    def decode(self) -> np.ndarray:
        """Weights as float32 [out, in], in the arithmetic of llama.cpp's dequantisers."""
        rows, columns = self.codes.shape
        codes = self.codes.reshape(rows, -1, self.spec.group_size)
        scales, offsets = self.group_parameters()
        scales = scales[..., None]
        if self.spec.kind == "codebook":
            values = np.array(self.spec.codebook, np.float32)[codes] * scales
        elif self.spec.kind == "symmetric":
            values = (codes.astype(np.float32) - self.spec.levels // 2) * scales
        elif self.spec.kind == "zero":
            values = (codes.astype(np.float32) - offsets[..., None]) * scales
        else:
            values = codes.astype(np.float32) * scales + offsets[..., None]
        return values.reshape(rows, columns)


def is_checkpoint(path: str | Path) -> bool:
    """Whether `path` is a folder that `quantize` wrote."""
    return (Path(path) / MANIFEST).is_file()


def check_replaceable(path: Path, overwrite: bool, what: str = "checkpoint",
                      is_one: Callable[[Path], bool] = is_checkpoint) -> None:
    """InputError when a folder of that kind, by default a checkpoint, cannot be put at `path`: it is taken, or
    (`overwrite`) by something else than such a folder or an empty one."""
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"{path} exists; choose another --out or pass --overwrite")
    if not path.is_dir() or (any(path.iterdir()) and not is_one(path)):
        raise InputError(f"{path} is no {what}, and --overwrite replaces nothing else; choose another --out")


def same_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Equal arrays of one dtype, the sign of zero included."""
    kind = f"u{left.dtype.itemsize}"
    return left.dtype == right.dtype and np.array_equal(left.view(kind), right.view(kind))


Tensors = dict[str, QuantizedTensor | np.ndarray]
InputSums = dict[str, tuple[np.ndarray, int]]  # Σ x² [in] and the number of tokens, by the matrix's name
INPUTS = "inputs-"  # before the name of the file whose matrices they are of


def save_shard(path: Path, tensors: Tensors, file: str) -> dict[str, dict]:
    """Write `tensors` to `path` and return their entries in a manifest, where the shard is called `file`."""
    flat, entries = {}, {}
    for name, tensor in tensors.items():
        entry = {"file": file}
        if isinstance(tensor, QuantizedTensor):
            entry |= {"grid": tensor.spec.name, "shape": list(tensor.codes.shape)}
            flat |= {f"{name}.{part}": array for part, array in tensor.parts().items()}
        else:
            entry |= {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
            flat[name] = tensor
        entries[name] = entry
    flat = {key: np.ascontiguousarray(value) for key, value in flat.items()}
    save_file(flat, path, metadata={"format": "np"})
    return entries


def save_input_sums(path: Path, sums: InputSums) -> None:
    """Write `sums` to `path`."""
    flat = {f"{name}.in_sum2": np.ascontiguousarray(squares, np.float32) for name, (squares, _) in sums.items()}
    flat |= {f"{name}.counts": np.array([tokens], np.float32) for name, (_, tokens) in sums.items()}
    save_file(flat, path, metadata={"format": "np"})


def read_shard(path: Path, entries: dict[str, dict]) -> Tensors:
    """The tensors of a shard that `save_shard` wrote, by its `entries`."""
    with safe_open(path, framework="np") as handle:
        return {name: QuantizedCheckpoint._read(handle, name, entry) for name, entry in entries.items()}


def manifest_text(manifest: dict, tensors: dict[str, dict]) -> str:
    """The text of `optrot.json`; ValueError for NaN, which JSON has not."""
    whole = {"format_version": FORMAT_VERSION, **manifest, "tensors": tensors}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


class CheckpointWriter:
    """Writes a checkpoint into a temporary folder beside `path`; `finish` renames it into place.

    Use as a context manager: leaving it without `finish` removes the temporary folder. `overwrite`
    replaces a checkpoint or an empty folder, never anything else. Raises InputError when `path` is
    taken, StorageError when it cannot be written.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        self.path = Path(path)
        check_replaceable(self.path, overwrite)
        beside = self.path.absolute()  # "." has no name to build on
        self.work = beside.with_name(beside.name + ".partial")
        self.tensors: dict[str, dict] = {}
        shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}; choose another --out") from None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exc) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        restore_folder(self.path)

    def kept(self, shard: str) -> None:
        """What an interrupted run left of `shard`: nothing here, see `optrot_edge.resume.WorkFolder`."""

    def write_shard(self, shard: str, tensors: Tensors, reports: dict | None = None,
                    inputs: InputSums | None = None) -> None:
        """Write `tensors` as `shard`.safetensors, and the sums of their `inputs`, if there are any; `reports` on them
        are for writers that resume."""
        file = f"{shard}.safetensors"
        try:
            if inputs:
                save_input_sums(self.work / (INPUTS + file), inputs)
            self.tensors |= save_shard(self.work / file, tensors, file)
        except (SafetensorError, OSError) as error:
            raise StorageError(f"{self.path} cannot be written: {error}") from None

    def adopt(self, better: Path, note: str, about: dict) -> None:
        """Put the shards of the folder `better` in the place of those of the same names; `note` is for writers that
        resume."""
        for path in sorted(better.glob("*.safetensors")):
            path.replace(self.work / path.name)

    def finish(self, manifest: dict) -> Path:
        """Write the manifest and move the folder into place."""
        text = manifest_text(manifest, self.tensors)
        try:
            (self.work / MANIFEST).write_text(text, encoding="utf-8")
            move_folder(self.work, self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error}") from None
        return self.path


class NoWriter:
    """Stands for the writer and its work folder in the processes of a torchrun launch that write nothing."""

    work, is_complete = None, False

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __enter__(self) -> NoWriter:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def begin(self, settings: dict) -> NoWriter:
        """The folder, which is this."""
        return self

    def kept(self, shard: str) -> None:
        """Nothing: such a run is not resumed."""

    def rotation(self, make):
        """The rotation that `make()` returns, with what storing it does to it, as rank 0 has it."""
        with tempfile.TemporaryDirectory() as folder:
            rotation, path = make(), Path(folder) / "rotation.safetensors"
            rotation.save(path)
            return type(rotation).load(path)

    def write_shard(self, shard: str, tensors: Tensors, reports: dict | None = None,
                    inputs: InputSums | None = None) -> None:
        """Nothing."""

    def save_tokenizer(self, source) -> None:
        """Nothing."""

    def complete(self, manifest: dict) -> None:
        """Nothing."""

    def finish(self, folder: NoWriter) -> Path:
        """Where rank 0 writes."""
        return self.path


class QuantizedCheckpoint:
    """A checkpoint on disk; tensors are read on demand.

    `manifest` is `optrot.json`: `model` (ModelConfig.to_dict), `rotation`, `recipe`, `versions`,
    `inputs` (file hashes), `errors` (per layer), `tensors`, and `bfloat16`: names of the float32 tensors that hold
    bfloat16 values, to be stored as such.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise InputError(f"{path}: no {MANIFEST}; not a quantised checkpoint "
                             "(make one with `optrot-edge quantize`)") from None
        except (ValueError, OSError) as error:
            raise InputError(f"{path}/{MANIFEST}: {error}") from None
        if not isinstance(self.manifest, dict) or self.manifest.get("format_version") != FORMAT_VERSION:
            raise InputError(f"{path}/{MANIFEST}: format_version is not {FORMAT_VERSION}; "
                             "it was written by another version of optrot-edge")

    @classmethod
    def unfinished(cls, writer: CheckpointWriter, manifest: dict) -> QuantizedCheckpoint:
        """What `writer` has written so far, to be read before it is finished with `manifest`."""
        checkpoint = cls.__new__(cls)
        checkpoint.path, checkpoint.manifest = writer.work, manifest | {"tensors": writer.tensors}
        return checkpoint

    @property
    def names(self) -> list[str]:
        """Canonical tensor names, e.g. `layers.0.q_proj.weight`, `embed_tokens.weight`."""
        return list(self.manifest["tensors"])

    @property
    def bfloat16(self) -> frozenset[str]:
        """Names of the float32 tensors that hold bfloat16 values."""
        return frozenset(self.manifest.get("bfloat16") or ())

    def __contains__(self, name: str) -> bool:
        return name in self.manifest["tensors"]

    def get(self, name: str) -> QuantizedTensor | np.ndarray:
        """One tensor; InputError if it is missing or damaged."""
        entry = self.manifest["tensors"].get(name)
        if entry is None:
            raise InputError(f"{self.path}: no tensor {name!r}")
        try:
            with safe_open(self.path / entry["file"], framework="np") as handle:
                tensor = self._read(handle, name, entry)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path}/{entry['file']} is missing or damaged ({error}); quantise again") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: {name} is damaged ({error!r}); quantise again") from None
        return tensor

    def input_sums(self, name: str) -> tuple[np.ndarray, float]:
        """Σ x² [in] of what the matrix `name` reads, and over how many tokens; InputError when that was not kept."""
        entry = self.manifest["tensors"][name]
        path = self.path / (INPUTS + entry["file"])
        if not path.is_file():
            raise InputError(f"{self.path} holds no statistics of the inputs of {name}: it was made without "
                             "calibration text, or by an older optrot-edge; quantise again with --calibration")
        try:
            with safe_open(path, framework="np") as handle:
                squares, count = (handle.get_tensor(f"{name}.{part}") for part in ("in_sum2", "counts"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged ({error}); quantise again") from None
        if squares.shape != (entry["shape"][1],) or count.shape != (1,) or not np.isfinite(squares).all():
            raise InputError(f"{path} is damaged: {name}.in_sum2 is {list(squares.shape)}; quantise again")
        return squares, float(count[0])

    @staticmethod
    def _read(handle, name: str, entry: dict) -> QuantizedTensor | np.ndarray:
        shape = tuple(entry["shape"])
        if "grid" not in entry:
            tensor = handle.get_tensor(name)
            _require(tensor, shape, entry["dtype"])
            return tensor
        spec = grid_spec(entry["grid"])
        if len(shape) != 2 or shape[1] % spec.block_size:
            raise ValueError(f"{list(shape)} does not divide into {spec.name}'s blocks of {spec.block_size}")
        per_block, per_group = (shape[0], shape[1] // spec.block_size), (shape[0], shape[1] // spec.group_size)

        def read(part: str | None, wanted: tuple[int, int], dtype: str):
            array = None if part is None else handle.get_tensor(f"{name}.{part}")
            if array is not None:
                _require(array, wanted, dtype)
            return array

        stored = STORED_DTYPES[spec.scale_dtype]
        codes, scales = read("codes", shape, "uint8"), read("scales", per_block, stored)
        if codes.max(initial=0) >= spec.levels:
            raise ValueError(f"a code of {codes.max()} where {spec.name} has {spec.levels} levels")
        offsets = read(spec.offset_name, per_block, "uint8" if spec.kind == "zero" else stored)
        if not spec.subscales:
            return QuantizedTensor(spec, codes, scales, offsets)
        subscales = read("subscales", per_group, spec.subscale_dtype)
        suboffsets = read("submins" if spec.kind == "min" else None, per_group, spec.subscale_dtype)
        for integers in (subscales, suboffsets):
            if integers is not None and not spec.subscales[0] <= integers.min() <= integers.max() <= spec.subscales[1]:
                raise ValueError(f"integer scales beyond {spec.name}'s {list(spec.subscales)}")
        return QuantizedTensor(spec, codes, scales, offsets, subscales, suboffsets)

    def weights(self, name: str) -> np.ndarray:
        """The tensor as float32, decoded when it is quantised."""
        tensor = self.get(name)
        return tensor.decode() if isinstance(tensor, QuantizedTensor) else tensor.astype(np.float32)


def chosen_by_auto(manifest: dict) -> dict:
    """{"auto": what `--rotation auto` chose, "why": its reason}; empty for a checkpoint made otherwise."""
    auto = manifest.get("auto")
    return {"auto": auto.get("chosen"), "why": auto.get("why")} if isinstance(auto, dict) else {}


def _require(array: np.ndarray, shape: tuple[int, ...], dtype: str) -> None:
    """ValueError unless `array` is what the manifest announces."""
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{array.dtype} {list(array.shape)} where {dtype} {list(shape)} belongs")
