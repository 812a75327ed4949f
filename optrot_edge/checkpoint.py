"""QuantizedCheckpoint: codes, stored-precision scales and a manifest; all that exporters read.

A folder holding `optrot.json` (the manifest) and safetensors files, one per decoder layer and one
for the rest. A quantised tensor `NAME` is stored as `NAME.codes` (uint8 [out, in]),
`NAME.scales` and, for grids with an offset, `NAME.mins` or `NAME.zeros` ([out, in / group_size]).
Scales and mins already have the precision that the target format stores. A float tensor is stored
under its own name. Needs numpy and safetensors only.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from optrot_edge.errors import InputError

MANIFEST = "optrot.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class GridSpec:
    """The levels a format can store.

    `kind`: "symmetric" `s·(q − 2^(bits−1))`, "min" `s·q + m` (float min), or "zero" `s·(q − z)`
    (integer zero-point). `scale_dtype` is the stored precision of scales and mins.
    """

    name: str
    bits: int
    group_size: int
    kind: str
    scale_dtype: str = "float16"

    @property
    def levels(self) -> int:
        """Number of codes."""
        return 2**self.bits

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and offsets included."""
        scale = np.dtype(self.scale_dtype).itemsize * 8
        offset = {"symmetric": 0, "min": scale, "zero": self.bits}[self.kind]
        return self.bits + (scale + offset) / self.group_size

    @property
    def offset_name(self) -> str | None:
        """Suffix of the stored offset tensor: "mins", "zeros" or None."""
        return {"symmetric": None, "min": "mins", "zero": "zeros"}[self.kind]


GGUF_GRIDS = {
    "q4_0": GridSpec("q4_0", 4, 32, "symmetric"),
    "q4_1": GridSpec("q4_1", 4, 32, "min"),
    "q5_0": GridSpec("q5_0", 5, 32, "symmetric"),
    "q5_1": GridSpec("q5_1", 5, 32, "min"),
    "q8_0": GridSpec("q8_0", 8, 32, "symmetric"),
}
FLOAT_TYPES = ("f32", "f16")


def grid_spec(name: str) -> GridSpec:
    """The grid of that name: a GGUF type, or `int{2..8}-g{group}-{sym|zero|min}`.

    Raises InputError for an unknown name.
    """
    name = name.lower()
    if name in GGUF_GRIDS:
        return GGUF_GRIDS[name]
    match = re.fullmatch(r"int([2-8])-g([1-9]\d*)-(sym|zero|min)", name)
    if not match:
        raise InputError(f"unknown grid {name!r}; use one of {', '.join(GGUF_GRIDS)}, "
                         "or int{2..8}-g{group}-{sym|zero|min} such as int4-g128-sym")
    kind = {"sym": "symmetric", "zero": "zero", "min": "min"}[match[3]]
    return GridSpec(name, int(match[1]), int(match[2]), kind, "float32")


@dataclass
class QuantizedTensor:
    """Codes uint8 [out, in] on `spec`'s grid; scales and offsets [out, in / group_size]."""

    spec: GridSpec
    codes: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None = None

    def decode(self) -> np.ndarray:
        """Weights as float32 [out, in], in the arithmetic of llama.cpp's dequantisers."""
        rows, columns = self.codes.shape
        codes = self.codes.reshape(rows, -1, self.spec.group_size).astype(np.float32)
        scales = self.scales.astype(np.float32)[..., None]
        if self.spec.kind == "symmetric":
            values = (codes - self.spec.levels // 2) * scales
        elif self.spec.kind == "zero":
            values = (codes - self.offsets.astype(np.float32)[..., None]) * scales
        else:
            values = codes * scales + self.offsets.astype(np.float32)[..., None]
        return values.reshape(rows, columns)


class CheckpointWriter:
    """Writes a checkpoint into a temporary folder beside `path`; `finish` renames it into place.

    Use as a context manager: leaving it without `finish` removes the temporary folder. `overwrite`
    replaces a checkpoint or an empty folder, never anything else. Raises InputError when `path` is
    taken or cannot be written.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        self.path = Path(path)
        self._check_replaceable(overwrite)
        beside = self.path.absolute()  # "." has no name to build on
        self.work = beside.with_name(beside.name + ".partial")
        self._replaced = beside.with_name(beside.name + ".replaced")
        self.tensors: dict[str, dict] = {}
        shutil.rmtree(self.work, ignore_errors=True)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot create {self.path}: {error.strerror}; choose another --out") from None

    def _check_replaceable(self, overwrite: bool) -> None:
        if not self.path.exists():
            return
        if not overwrite:
            raise InputError(f"{self.path} exists; choose another --out or pass --overwrite")
        if not self.path.is_dir() or (not (self.path / MANIFEST).is_file() and any(self.path.iterdir())):
            raise InputError(f"{self.path} is no checkpoint, and --overwrite replaces nothing else; "
                             "choose another --out")

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *exc) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self._replaced.exists() and not self.path.exists():
            self._replaced.rename(self.path)  # stopped between the two renames of `finish`
        shutil.rmtree(self._replaced, ignore_errors=True)

    def write_shard(self, shard: str, tensors: dict[str, QuantizedTensor | np.ndarray]) -> None:
        """Write `tensors` as `shard`.safetensors."""
        flat = {}
        for name, tensor in tensors.items():
            entry = {"file": f"{shard}.safetensors"}
            if isinstance(tensor, QuantizedTensor):
                entry |= {"grid": tensor.spec.name, "shape": list(tensor.codes.shape)}
                flat[f"{name}.codes"], flat[f"{name}.scales"] = tensor.codes, tensor.scales
                if tensor.offsets is not None:
                    flat[f"{name}.{tensor.spec.offset_name}"] = tensor.offsets
            else:
                entry |= {"dtype": str(tensor.dtype), "shape": list(tensor.shape)}
                flat[name] = tensor
            self.tensors[name] = entry
        flat = {key: np.ascontiguousarray(value) for key, value in flat.items()}
        try:
            save_file(flat, self.work / f"{shard}.safetensors", metadata={"format": "np"})
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.path} cannot be written: {error}") from None

    def finish(self, manifest: dict) -> Path:
        """Write the manifest and move the folder into place."""
        manifest = {"format_version": FORMAT_VERSION, **manifest, "tensors": self.tensors}
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        try:
            (self.work / MANIFEST).write_text(text, encoding="utf-8")
            if self.path.exists():
                self.path.rename(self._replaced)
            self.work.rename(self.path)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error}") from None
        return self.path


class QuantizedCheckpoint:
    """A checkpoint on disk; tensors are read on demand.

    `manifest` is `optrot.json`: `model` (ModelConfig.to_dict), `rotation`, `recipe`, `versions`,
    `inputs` (file hashes), `errors` (per layer), `tensors`.
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

    @property
    def names(self) -> list[str]:
        """Canonical tensor names, e.g. `layers.0.q_proj.weight`, `embed_tokens.weight`."""
        return list(self.manifest["tensors"])

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

    @staticmethod
    def _read(handle, name: str, entry: dict) -> QuantizedTensor | np.ndarray:
        shape = tuple(entry["shape"])
        if "grid" not in entry:
            tensor = handle.get_tensor(name)
            _require(tensor, shape, entry["dtype"])
            return tensor
        spec = grid_spec(entry["grid"])
        codes, scales = handle.get_tensor(f"{name}.codes"), handle.get_tensor(f"{name}.scales")
        offsets = handle.get_tensor(f"{name}.{spec.offset_name}") if spec.offset_name else None
        per_group = (shape[0], shape[1] // spec.group_size)
        _require(codes, shape, "uint8")
        _require(scales, per_group, spec.scale_dtype)
        if offsets is not None:
            _require(offsets, per_group, "uint8" if spec.kind == "zero" else spec.scale_dtype)
        return QuantizedTensor(spec, codes, scales, offsets)

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
