"""Which runtime runs what: packages and references by their kind on disk."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

from optrot_edge.checkpoint import MANIFEST
from optrot_edge.errors import InputError
from optrot_edge.runtime.imports import installed, require

BACKENDS = ("llama.cpp", "torch")


def local_path(model: str | Path) -> Path:
    """The path itself, or where a hub id (`owner/name`) was downloaded to. Raises InputError."""
    path = Path(model)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return path
    require("torch", "learn", "a model from the hub")
    from optrot_edge.models import open_model

    return Path(open_model(str(model)).path)


def kind_of(path: str | Path) -> str:
    """"gguf", "checkpoint", "hf" (folder) or "reference" (file). Raises InputError."""
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return "checkpoint"
        if (path / "config.json").is_file():
            return "hf"
        raise InputError(f"{path}: a folder with neither {MANIFEST} nor config.json")
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name.endswith((".json", ".json.gz")):
        return "reference"
    with path.open("rb") as handle:
        if handle.read(4) == b"GGUF" or path.suffix == ".gguf":
            return "gguf"
    raise InputError(f"{path}: neither a GGUF, a quantised checkpoint, a model folder nor a reference file "
                     "(.json)")


def _checked(backend: str | None) -> str | None:
    if backend not in (None, *BACKENDS):
        raise InputError(f"unknown backend {backend!r}; use {' or '.join(BACKENDS)}")
    return backend


def open_backend(path: str | Path, backend: str | None, device: str):
    """A backend that gives logits of the model at `path`; see `LlamaCppBackend` and `TorchBackend`."""
    from optrot_edge.runtime.llama_cpp import LlamaCppBackend
    from optrot_edge.runtime.torch_reference import TorchBackend

    if backend == "torch":
        return TorchBackend(path, device=device)
    return LlamaCppBackend(path, device=device)


def open_package(path: str | Path, backend: str | None = None, device: str = "cpu"):
    """A package's backend: llama.cpp for a GGUF unless `backend` says torch, torch for a checkpoint."""
    kind = kind_of(path)
    if kind not in ("gguf", "checkpoint"):
        raise InputError(f"{path}: not a package; give a .gguf or a folder that `optrot-edge quantize` wrote")
    backend = _checked(backend) or ("llama.cpp" if kind == "gguf" else "torch")
    if kind == "checkpoint" and backend != "torch":
        raise InputError(f"{path}: a quantised checkpoint runs in torch only; export it to GGUF for "
                         "llama.cpp")
    return open_backend(path, backend, device)


def open_reference(path: str | Path, backend: str | None = None, device: str = "cpu"):
    """The backend of a reference model.

    A GGUF is dequantised and computed in float32 torch when torch is installed, otherwise it runs in
    llama.cpp; a Hugging Face folder or a checkpoint runs in torch. The report names what was used.
    """
    kind = kind_of(path)
    if kind == "reference":
        raise InputError(f"{path}: a reference file is not a model")
    backend = _checked(backend)
    if backend is None:
        has_torch = installed("torch")
        backend = "llama.cpp" if kind == "gguf" and not has_torch else "torch"
    if kind != "gguf" and backend != "torch":
        raise InputError(f"{path}: llama.cpp runs GGUF files only; leave the reference's backend to torch")
    return open_backend(path, backend, device)


def size_on_disk(path: str | Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    path = Path(path)
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)


def bits_per_weight(path: str | Path) -> float:
    """Stored bits of the package's tensors divided by their number of weights."""
    if kind_of(path) == "gguf":
        return _gguf_bits_per_weight(path)
    from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint

    return DecodedCheckpoint(path).stored_bits_per_weight


def _gguf_bits_per_weight(path: str | Path) -> float:
    from optrot_edge.models.gguf_file import GGUFFile

    tensors = GGUFFile(path).tensors.values()
    weights = sum(prod(tensor.shape) for tensor in tensors)
    stored = sum(8 * tensor.row_bytes * prod(tensor.shape[:-1]) for tensor in tensors)
    return stored / weights if weights else 0.0
