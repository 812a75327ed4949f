"""The GGUF container, versions 2 and 3, parsed defensively. Needs numpy and gguf, no torch.

Layout: ggml/docs/gguf.md of llama.cpp. Every count and length is checked against the bytes that
are left before it is used, so a damaged file ends in an InputError, never in a hang or a huge
allocation; `gguf.GGUFReader` trusts the header.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from optrot_edge.errors import InputError, StorageError
from optrot_edge.models.gguf_parts import siblings

MAGIC, VERSION = b"GGUF", 3
_SCALARS = {
    GGUFValueType.UINT8: "<B", GGUFValueType.INT8: "<b", GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h", GGUFValueType.UINT32: "<I", GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f", GGUFValueType.BOOL: "<?", GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q", GGUFValueType.FLOAT64: "<d",
}
_CHUNK_BYTES = 1 << 22  # dequantising in pieces keeps the peak at the size of the result


@dataclass(frozen=True)
class ArrayInfo:
    """An array in the metadata: its items stay in the file."""

    item_type: GGUFValueType
    count: int


@dataclass(frozen=True)
class Entry:
    """One key of the metadata: its value, and where key, type and value lie in the file."""

    value: bool | int | float | str | ArrayInfo
    start: int
    end: int


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` is numpy's order ([out, in]); `offset` is absolute, in bytes, in the file `path`."""

    path: Path
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    row_bytes: int


class GGUFFile:
    """Header of a GGUF: `entries` (metadata by key) and `tensors` (TensorInfo by name).

    `path` is the file, or the first part of a split one, whose other parts are read too; `files` are all of them.
    Raises InputError if a file is missing, not a GGUF, damaged, truncated, big-endian or of version 1.
    """

    def __init__(self, path: str | Path, *, whole: bool = True):
        """`whole` False: this file only, whichever part it is."""
        self.path = Path(path)
        self.files = [self.path]
        self.entries: dict[str, Entry] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if self.size < 24 or file.read(4) != MAGIC:
                    raise InputError(f"{self.path} is not a GGUF file")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._parse(_Cursor(self.path, data))
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error}") from None
        count = self.value("split.count", 0)
        if whole and count not in (0, 1):
            self._join(count)

    def value(self, key: str, default=None):
        """Scalar, string or ArrayInfo stored under `key`, or `default`."""
        return self.entries[key].value if key in self.entries else default

    def read(self, name: str, out: np.ndarray | None = None, rows: slice | None = None) -> np.ndarray:
        """The tensor, or some `rows` of a matrix, as float32 (or written into `out`, any float dtype), dequantised by
        rows.

        Raises InputError if the bytes are not there.
        """
        info, before = self.tensors[name], 0
        shape = info.shape
        if rows is not None:
            before, shape = rows.start, (min(rows.stop, shape[0]) - rows.start, *shape[1:])
        out = np.empty(shape, np.float32) if out is None else out
        rows = out.reshape(-1, info.shape[-1])
        step = max(1, _CHUNK_BYTES // info.row_bytes)
        for start in range(0, len(rows), step):
            count = min(step, len(rows) - start)
            try:
                raw = np.fromfile(info.path, np.uint8, count * info.row_bytes,
                                  offset=info.offset + (before + start) * info.row_bytes)
            except OSError as error:
                raise InputError(f"{info.path}: {name} cannot be read: {error}") from None
            if raw.size != count * info.row_bytes:
                raise InputError(f"{info.path} is truncated: {name} ends early")
            with np.errstate(all="ignore"):  # damaged scales are caught by the caller's NaN check
                rows[start:start + count] = dequantize(raw.reshape(count, -1), info.type)
        return out

    def write_metadata(self, path: str | Path, prefixes: tuple[str, ...]) -> Path:
        """Write a GGUF without tensors whose metadata are this file's keys under `prefixes`.

        The bytes of each entry are copied, so types and array items are kept exactly.
        """
        path = Path(path)
        chosen = [entry for key, entry in self.entries.items() if key.startswith(prefixes)]
        partial = path.with_name(path.name + ".partial")
        try:
            with open(self.path, "rb") as source, open(partial, "wb") as target:
                target.write(MAGIC + struct.pack("<IQQ", VERSION, 0, len(chosen)))
                for entry in chosen:
                    source.seek(entry.start)
                    target.write(source.read(entry.end - entry.start))
            return partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise StorageError(f"cannot write {path}: {error}") from None

    def _parse(self, cursor: _Cursor) -> None:
        cursor.take(4)
        version = cursor.number("<I")
        if version not in (2, VERSION):
            kind = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF version {version}"
            raise InputError(f"{self.path} is a {kind}, which is not supported; use version 2 or 3")
        tensor_count, key_count = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(key_count):  # ends at the end of the file at the latest: entries have a size
            start = cursor.position
            key = cursor.text()
            if key in self.entries:
                cursor.fail(f"key {key} appears twice")
            value = cursor.value(cursor.value_type())
            self.entries[key] = Entry(value, start, cursor.position)
        found = [self._tensor(cursor) for _ in range(cursor.fitting(tensor_count, 24))]
        alignment = self.value("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment < 2**31 or alignment & (alignment - 1):
            cursor.fail(f"general.alignment is {alignment!r}")
        base = -(-cursor.position // alignment) * alignment
        for name, info, size in found:
            if name in self.tensors:
                cursor.fail(f"tensor {name} appears twice")
            if info.offset % alignment or base + info.offset + size > self.size:
                cursor.fail(f"tensor {name} lies outside the file")
            self.tensors[name] = dataclasses.replace(info, offset=base + info.offset)

    def _join(self, count) -> None:
        """Add the tensors of the other parts; this file must be the first of them."""
        number, announced = self.value("split.no"), self.value("split.tensors.count")
        if not isinstance(count, int) or not isinstance(number, int) or not 0 <= number < count:
            raise InputError(f"{self.path} is damaged: split.no is {number!r} and split.count {count!r}")
        self.files = siblings(self.path, number, count)
        if number:
            raise InputError(f"{self.path} is part {number + 1} of {count} of a split GGUF; give the first, "
                             f"{self.files[0]}")
        for index, path in enumerate(self.files[1:], 1):
            if not path.is_file():
                raise InputError(f"{path} is missing: {self.path} is part 1 of {count} of a split GGUF, and all parts "
                                 "must lie in one folder; download or copy it again")
            part = GGUFFile(path, whole=False)
            if (part.value("split.no"), part.value("split.count")) != (index, count):
                raise InputError(f"{path} is not part {index + 1} of {count}: its keys say split.no "
                                 f"{part.value('split.no')!r} and split.count {part.value('split.count')!r}")
            if twice := part.tensors.keys() & self.tensors.keys():
                raise InputError(f"{path}: tensor {min(twice)} is in an earlier part too; the parts are not of one set")
            self.tensors |= part.tensors
            self.size += part.size
        if announced != len(self.tensors):
            raise InputError(f"{self.path}: split.tensors.count is {announced!r}, but the {count} parts hold "
                             f"{len(self.tensors)} tensors; they are not of one set")

    def _tensor(self, cursor: _Cursor) -> tuple[str, TensorInfo, int]:
        """Name, info with the offset relative to the data, and size in bytes."""
        name = cursor.text()
        dimensions = cursor.number("<I")
        if not 1 <= dimensions <= 4:
            cursor.fail(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(reversed([cursor.number("<Q") for _ in range(dimensions)]))
        raw_type = cursor.number("<I")
        try:
            kind = GGMLQuantizationType(raw_type)
        except ValueError:
            raise InputError(f"{self.path}: tensor {name} has the unknown type {raw_type}") from None
        block, type_size = GGML_QUANT_SIZES[kind]
        if min(shape) == 0 or shape[-1] % block:
            cursor.fail(f"tensor {name} of type {kind.name} has the shape {list(shape)}")
        row_bytes, size = shape[-1] // block * type_size, 1
        for length in shape[:-1]:
            size *= length
        return name, TensorInfo(self.path, shape, kind, cursor.number("<Q"), row_bytes), size * row_bytes


def can_dequantize(kind: GGMLQuantizationType) -> bool:
    """Whether gguf-py decodes this type to float."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


class _Cursor:
    """Bounds-checked little-endian reads from a buffer."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.position = path, data, 0

    def fail(self, what: str) -> None:
        raise InputError(f"{self.path} is truncated or damaged: {what}")

    def fitting(self, count: int, item_size: int) -> int:
        """`count`, after checking that so many items of at least `item_size` bytes are left."""
        if count * item_size > len(self.data) - self.position:
            self.fail(f"{count} items announced at byte {self.position}, more than there is room for")
        return count

    def take(self, size: int) -> int:
        start = self.position
        self.position += self.fitting(size, 1)
        return start

    def number(self, code: str):
        return struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]

    def text(self, errors: str = "strict") -> str:
        length = self.number("<Q")
        start = self.take(length)
        try:
            return self.data[start:start + length].decode("utf-8", errors)
        except UnicodeDecodeError:
            raise InputError(f"{self.path} is truncated or damaged: a name at byte {start} "
                             "is not UTF-8") from None

    def value_type(self) -> GGUFValueType:
        raw = self.number("<I")
        try:
            return GGUFValueType(raw)
        except ValueError:
            raise InputError(f"{self.path} is truncated or damaged: value type {raw} at byte "
                             f"{self.position - 4}") from None

    def value(self, kind: GGUFValueType):
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == GGUFValueType.STRING:
            return self.text(errors="replace")
        item_type, count = self.value_type(), self.number("<Q")
        if item_type == GGUFValueType.ARRAY:
            self.fail("an array of arrays")
        if item_type in _SCALARS:
            self.take(count * struct.calcsize(_SCALARS[item_type]))
        else:
            for _ in range(self.fitting(count, 8)):
                self.take(self.number("<Q"))
        return ArrayInfo(item_type, count)
