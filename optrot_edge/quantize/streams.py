"""The residual stream of the calibration tokens: in memory, or in a file where memory is short."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from optrot_edge.errors import StorageError
from optrot_edge.memory import CHUNK


class Stream:
    """float32 activations [windows, length, width], read and written a few windows at a time.

    With a `folder` they lie in a file there, without a name, so that it goes with the process; what is read is a copy.
    In memory it is a view. Raises StorageError when the disk is full.
    """

    def __init__(self, windows: int, length: int, width: int, folder: str | Path | None = None):
        self.shape, self._file, self._tensor = (windows, length, width), None, None
        if folder is None:
            self._tensor = torch.empty(self.shape)
            return
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, max(1, 4 * windows * length * width))
        except OSError as error:
            raise StorageError(f"cannot keep activations in {folder}: {error.strerror}") from None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, windows: slice) -> torch.Tensor:
        """Some windows."""
        if self._file is None:
            return self._tensor[windows]
        part = torch.empty(windows.stop - windows.start, *self.shape[1:])
        self._seek(windows)
        view, done = memoryview(part.numpy()).cast("B"), 0
        while done < len(view):
            if not (count := self._file.readinto(view[done:])):
                raise StorageError("activations kept on the disk are gone")
            done += count
        return part

    def write(self, windows: slice, part: torch.Tensor) -> None:
        """Put `part` in the place of some windows."""
        if self._file is None:
            if part.data_ptr() != self._tensor[windows].data_ptr():
                self._tensor[windows] = part
            return
        self._seek(windows)
        view, done = memoryview(part.contiguous().numpy()).cast("B"), 0
        try:
            while done < len(view):
                done += self._file.write(view[done:])
        except OSError as error:
            raise StorageError(f"activations cannot be kept on the disk: {error.strerror}") from None

    def _seek(self, windows: slice) -> None:
        self._file.seek(4 * windows.start * self.shape[1] * self.shape[2])

    def batches(self, size: int, start: int = 0, stop: int | None = None):
        """Slices of up to `size` windows from `start` to `stop`."""
        stop = len(self) if stop is None else stop
        return (slice(first, min(first + size, stop)) for first in range(start, stop, size))

    def close(self) -> None:
        """Give the room back."""
        if self._file is not None:
            self._file.close()
        self._tensor = None


def embedded(tokens: torch.Tensor, rows, folder: str | Path | None = None) -> Stream:
    """The stream before the first layer of `tokens` [windows, length]; `rows(ids)` are those rows of the embedding."""
    ids, places = tokens.unique(return_inverse=True)
    table = rows(ids)
    stream = Stream(*tokens.shape, table.shape[1], folder)
    for windows in stream.batches(8):
        stream.write(windows, torch.nn.functional.embedding(places[windows], table))
    return stream


def picked_rows(chunks, ids: torch.Tensor) -> torch.Tensor:
    """The rows `ids` (ascending) of a matrix that comes in chunks of rows."""
    found, first = [], 0
    for rows in chunks:
        here = ids[(ids >= first) & (ids < first + len(rows))]
        found.append(rows[here - first])
        first += len(rows)
    return torch.cat(found)


def native_chunks(source):
    """The embedding of an open model, float32, CHUNK rows at a time."""
    vocab = source.config.vocab_size
    return (source.rows("embed_tokens.weight", start, min(start + CHUNK, vocab)) for start in range(0, vocab, CHUNK))
