"""GGUF key/value entries: building them, and reading them out of a file with their types intact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from gguf import GGUFValueType as Type
from gguf.gguf_writer import GGUFValue

from optrot_edge.errors import InputError
from optrot_edge.models.gguf_file import GGUFFile

Entries = dict[str, GGUFValue]
_SCALARS = {kind: np.dtype(scalar).newbyteorder("<")
            for kind, scalar in gguf.GGUFReader.gguf_scalar_to_np.items()}


def u32(value: int) -> GGUFValue:
    """An unsigned 32-bit integer."""
    return GGUFValue(int(value), Type.UINT32)


def u64(value: int) -> GGUFValue:
    """An unsigned 64-bit integer."""
    return GGUFValue(int(value), Type.UINT64)


def u16(value: int) -> GGUFValue:
    """An unsigned 16-bit integer."""
    return GGUFValue(int(value), Type.UINT16)


def i32(value: int) -> GGUFValue:
    """A signed 32-bit integer."""
    return GGUFValue(int(value), Type.INT32)


def f32(value: float) -> GGUFValue:
    """A 32-bit float."""
    return GGUFValue(float(value), Type.FLOAT32)


def boolean(value: bool) -> GGUFValue:
    """A truth value."""
    return GGUFValue(bool(value), Type.BOOL)


def string(value: str) -> GGUFValue:
    """A UTF-8 string."""
    return GGUFValue(value, Type.STRING)


def array(values: Sequence, kind: Type) -> GGUFValue:
    """A non-empty array of `kind`."""
    return GGUFValue(list(values), Type.ARRAY, kind)


def read_entries(path: Path) -> Entries:
    """The keys of the GGUF file at `path`, types intact and strings as bytes, odd ones included.

    Empty arrays, which GGUFWriter cannot write, are left out. Raises InputError if the file is
    missing or damaged.
    """
    file = GGUFFile(path, whole=False)  # has checked every length
    try:
        with open(path, "rb") as handle:
            entries = {key: _parse(handle, entry.start, entry.end) for key, entry in file.entries.items()}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return {key: entry for key, entry in entries.items() if entry.type is not Type.ARRAY or entry.value}


def write_entries(path: Path, entries: Entries) -> None:
    """A GGUF at `path` of these keys and no tensors; of architecture llama if they name none."""
    name = entries.get("general.architecture")
    writer = gguf.GGUFWriter(path, name.value if name else "llama")
    try:
        for key, entry in entries.items():
            if key != "general.architecture":  # the writer's constructor has set it
                writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    finally:
        writer.close()


def _parse(handle: BinaryIO, start: int, end: int) -> GGUFValue:
    """The entry in bytes [start, end): key, type, value."""
    handle.seek(start)
    raw = handle.read(end - start)
    position = 8 + int.from_bytes(raw[:8], "little")
    kind, position = Type(int.from_bytes(raw[position:position + 4], "little")), position + 4
    if kind is Type.STRING:
        return GGUFValue(raw[position + 8:], kind)
    if kind is not Type.ARRAY:
        return GGUFValue(np.frombuffer(raw, _SCALARS[kind], 1, position).tolist()[0], kind)
    sub = Type(int.from_bytes(raw[position:position + 4], "little"))
    count, position = int.from_bytes(raw[position + 4:position + 12], "little"), position + 12
    if sub is not Type.STRING:
        return GGUFValue(np.frombuffer(raw, _SCALARS[sub], count, position).tolist(), kind, sub)
    values = []
    for _ in range(count):
        size = int.from_bytes(raw[position:position + 8], "little")
        values.append(raw[position + 8:position + 8 + size])
        position += 8 + size
    return GGUFValue(values, kind, sub)


def same_value(left: GGUFValue, right: GGUFValue) -> bool:
    """Whether two entries are stored as the same bytes (floats compared as their type rounds them)."""
    if left.type != right.type or left.sub_type != right.sub_type:
        return False
    return _stored(left) == _stored(right)


def _stored(entry: GGUFValue):
    kind = entry.sub_type if entry.type is Type.ARRAY else entry.type
    values = entry.value if entry.type is Type.ARRAY else [entry.value]
    if kind is Type.STRING:
        return [v.encode() if isinstance(v, str) else bytes(v) for v in values]
    return np.array(values, _SCALARS[kind]).tobytes()
