"""Tensors of every decoder layer on disk, one file per layer: statistics too large to hold at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from optrot_edge.errors import InputError


class LayerStore:
    """Named tensors per layer under a new folder in `parent` (by default where temporary files go).

    Removed with `close`, at the end of a `with` block, or when one raises inside it.
    Raises InputError when the folder or a file cannot be written.
    """

    def __init__(self, parent: str | Path | None, name: str):
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=f".optrot-{name}-", suffix=".partial", dir=parent))
        except OSError as error:
            raise InputError(f"cannot make a temporary folder in {parent}: {error.strerror}") from None

    def write(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        """Store a layer's tensors, float32."""
        held = {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(held, self._path(index))
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot write to {self.folder.parent}: {error}") from None

    def layer(self, index: int, device="cpu", dtype=torch.float64) -> dict[str, torch.Tensor]:
        """The layer's tensors."""
        return {name: tensor.to(device, dtype) for name, tensor in load_file(self._path(index)).items()}

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def close(self) -> None:
        """Delete the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()
