"""Safetensors written and read one tensor at a time, bfloat16 included. Needs numpy only.

The format (huggingface.co/docs/safetensors): the length of the header as a little-endian 64-bit number, the header,
JSON of each tensor's dtype, shape and place, and the tensors without gaps. The library's numpy functions hold all of a
file in memory and know no bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "|u1", "I32": "<i4"}


@dataclass(frozen=True)
class Entry:
    """A tensor's dtype in the file ("F32", "F16", "BF16", "U32", "I32") and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numpy_dtype(self) -> np.dtype:
        """numpy's dtype of the array, bfloat16 as its bits."""
        return np.dtype(_NUMPY[self.dtype])

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.numpy_dtype.itemsize


def write_safetensors(path: Path, entries: dict[str, Entry], arrays: Iterable[tuple[str, np.ndarray]],
                      metadata: dict[str, str]) -> None:
    """Write `arrays`, which come in the order of `entries`, each little-endian (bfloat16 as its bits), and flush.

    Raises RuntimeError for an array that is not what its entry says, OSError when the disk refuses.
    """
    header, start = {"__metadata__": metadata}, 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, start + entry.nbytes]}
        start += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for (name, entry), (given, array) in zip(entries.items(), arrays, strict=True):
            if given != name or array.shape != entry.shape or array.dtype != entry.numpy_dtype:
                raise RuntimeError(f"{path}: {given} is {array.dtype} {list(array.shape)} where {name} was announced "
                                   f"as {entry.dtype} {list(entry.shape)}")
            handle.write(np.ascontiguousarray(array).data)
        handle.flush()
        os.fsync(handle.fileno())


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, int]]:
    """Entries of a file and where in it each tensor begins; ValueError when it is damaged."""
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > os.fstat(handle.fileno()).st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    entries = {name: Entry(about["dtype"], tuple(about["shape"])) for name, about in header.items()}
    return entries, {name: 8 + length + about["data_offsets"][0] for name, about in header.items()}


def read_tensor(path: Path, entry: Entry, start: int) -> np.ndarray:
    """One tensor as it is stored; ValueError when the file ends before it does."""
    with open(path, "rb") as handle:
        handle.seek(start)
        return np.fromfile(handle, _NUMPY[entry.dtype], prod(entry.shape)).reshape(entry.shape)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits (uint16) of the bfloat16 numbers nearest to finite float32 `values`, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
