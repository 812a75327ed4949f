"""Models, read lazily: one decoder layer at a time, from a Hugging Face folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from optrot_edge.errors import InputError

if TYPE_CHECKING:
    from optrot_edge.models.source import ModelSource


def open_model(path_or_id: str | Path, revision: str | None = None) -> ModelSource:
    """Open a GGUF file, a Hugging Face folder or a hub id (`owner/name`, at `revision`).

    Nothing but headers is read here. Raises InputError if the model is missing, damaged,
    contradicts its own configuration, or belongs to a family that cannot be rotated.
    """
    from optrot_edge.models import gguf, hf  # torch and gguf only when a model is opened

    path = Path(path_or_id)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # no permission, or a name too long
        raise InputError(f"{path} cannot be opened: {error}") from None
    if is_file:
        return gguf.GGUFSource(path)
    return hf.HFSource(path if is_folder else hf.download(str(path_or_id), revision))
