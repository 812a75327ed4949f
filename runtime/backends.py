"""Which runtime runs what: packages and references by their kind on disk."""

from __future__ import annotations

import re
from math import prod
from pathlib import Path

from optrot_edge.checkpoint import MANIFEST
from optrot_edge.errors import InputError
from optrot_edge.models.mlx_folder import MlxFolder, is_mlx
from optrot_edge.models.onnx_folder import OnnxFolder, is_onnx
from optrot_edge.runtime.imports import installed, require
from optrot_edge.runtime.kld_file import is_kld

BACKENDS = ("llama.cpp", "mlx", "onnxruntime", "torch")
_RUNS = {"gguf": ("llama.cpp", "torch"), "checkpoint": ("torch",), "mlx": ("mlx",), "onnx": ("onnxruntime",),
         "hf": ("torch", "mlx")}
_WHAT = {"gguf": "a GGUF", "checkpoint": "a quantised checkpoint", "mlx": "an MLX package", "onnx": "an ONNX package",
         "hf": "a model folder"}


def local_path(model: str | Path) -> Path:
    """The path itself, or where a hub id (`owner/name`) was downloaded to. Raises InputError."""
    path = Path(model)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        return path
    require("torch", "learn", "a model from the hub")
    from optrot_edge.models import open_model

    return Path(open_model(str(model)).path)


def kind_of(path: str | Path) -> str:
    """"gguf", "checkpoint", "mlx" or "onnx" (packages), "hf" (a float model's folder) or "reference" (a file).

    Raises InputError.
    """
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return "checkpoint"
        if is_onnx(path):
            return "onnx"
        if (path / "config.json").is_file():
            return "mlx" if is_mlx(path) else "hf"
        raise InputError(f"{path}: a folder with neither {MANIFEST} nor config.json")
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    if path.name.endswith((".json", ".json.gz")) or is_kld(path):
        return "reference"
    with path.open("rb") as handle:
        if handle.read(4) == b"GGUF" or path.suffix == ".gguf":
            return "gguf"
    if path.suffix == ".onnx":
        raise InputError(f"{path}: give the package's folder, which holds genai_config.json, not its graph")
    raise InputError(f"{path}: neither a GGUF, a quantised checkpoint, an MLX or ONNX package, a model folder nor a "
                     "reference file (.json or llama-perplexity's)")


def _checked(backend: str | None) -> str | None:
    if backend not in (None, *BACKENDS):
        raise InputError(f"unknown backend {backend!r}; use {', '.join(BACKENDS)}")
    return backend


def open_backend(path: str | Path, backend: str | None, device: str, **options):
    """A backend that gives logits of the model at `path`: LlamaCppBackend, MlxBackend, OnnxBackend or TorchBackend."""
    from optrot_edge.runtime.llama_cpp import LlamaCppBackend
    from optrot_edge.runtime.mlx import MlxBackend
    from optrot_edge.runtime.onnx import OnnxBackend
    from optrot_edge.runtime.torch_reference import TorchBackend

    kinds = {"torch": TorchBackend, "mlx": MlxBackend, "onnxruntime": OnnxBackend}
    return kinds.get(backend, LlamaCppBackend)(path, device=device, **options)


def open_package(path: str | Path, backend: str | None = None, device: str = "cpu", *, kv_bits: int | None = None,
                 trust_remote_code: bool = False, accuracy_level: int | None = None, kv_type: str | None = None,
                 kv_rotation: bool = True, activations: int | None = None):
    """A package's backend: llama.cpp for a GGUF unless `backend` says torch, torch for a checkpoint, mlx for MLX,
    onnxruntime for ONNX.

    A float model's folder is a package if MLX wrote it, or with `backend` "mlx". kv_bits, trust_remote_code: see
    `MlxBackend`; accuracy_level: see `OnnxBackend`; kv_type, kv_rotation: see `KvCache.parse`; activations: see
    `TorchBackend`, as the other runtimes have their own way with them; InputError for other backends.
    """
    kind, backend = kind_of(path), _checked(backend)
    if kind == "hf" and (backend == "mlx" or (backend is None and MlxFolder(path).written_by_mlx)):
        kind = "mlx"
    if kind not in ("gguf", "checkpoint", "mlx", "onnx"):
        raise InputError(f"{path}: not a package; give a .gguf, an MLX or ONNX folder, or a folder that `optrot-edge "
                         "quantize` wrote")
    backend = _fitting(path, kind, backend or _RUNS[kind][0])
    for option, given, runtime, what in (("--kv-bits", kv_bits is not None, "mlx", "MLX"),
                                         ("--trust-remote-code", trust_remote_code, "mlx", "MLX"),
                                         ("--accuracy-level", accuracy_level is not None, "onnxruntime", "ONNX"),
                                         ("--kv-type", kv_type is not None, "llama.cpp", "GGUF"),
                                         ("--no-kv-rotation", not kv_rotation, "llama.cpp", "GGUF"),
                                         ("--activations", activations is not None, "torch", "torch-run")):
        if given and backend != runtime:
            raise InputError(f"{option} is for {what} packages; {path} runs in {backend}")
    own = {"mlx": {"kv_bits": kv_bits, "trust_remote_code": trust_remote_code},
           "onnxruntime": {"accuracy_level": accuracy_level},
           "llama.cpp": {"kv_type": kv_type, "kv_rotation": kv_rotation},
           "torch": {} if activations is None else {"activations": activations}}
    return open_backend(path, backend, device, **own.get(backend, {}))


def open_reference(path: str | Path, backend: str | None = None, device: str = "cpu", *,
                   trust_remote_code: bool = False, beside_package: bool = False):
    """The backend of a reference model.

    A GGUF is dequantised and computed in float32 torch when torch is installed, otherwise it runs in
    llama.cpp; a Hugging Face folder or a checkpoint runs in torch, an MLX package in mlx, an ONNX package in
    onnxruntime. The report names what was used. trust_remote_code: see `MlxBackend`. beside_package: `device` is where
    a package runs, so torch takes the CPU where it cannot use that (onnxruntime's WebGPU, say).
    """
    from optrot_edge.runtime.torch_reference import TorchBackend

    kind = kind_of(path)
    if kind == "reference":
        raise InputError(f"{path}: a reference file is not a model")
    backend = _checked(backend)
    if backend is None:
        backend = "torch" if kind == "gguf" and installed("torch") else _RUNS[kind][0]
    backend = _fitting(path, kind, backend)
    if beside_package and backend == "torch" and device not in ("auto", *TorchBackend.devices()):
        device = "cpu"
    return open_backend(path, backend, device, **({"trust_remote_code": trust_remote_code} if backend == "mlx" else {}))


def _fitting(path: str | Path, kind: str, backend: str) -> str:
    if backend not in _RUNS[kind]:
        raise InputError(f"{path}: {_WHAT[kind]} runs in {' or '.join(_RUNS[kind])} only, not in {backend}; leave "
                         "--backend out, or export the model for that runtime")
    return backend


def size_on_disk(path: str | Path) -> int:
    """Bytes of a file, of all parts of a split GGUF, or of all files in a folder."""
    path = Path(path)
    if path.is_file() and kind_of(path) == "gguf":
        from optrot_edge.models.gguf_file import GGUFFile

        return GGUFFile(path).size
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return sum(entry.stat().st_size for entry in files)


def bits_per_weight(path: str | Path) -> float:
    """Stored bits of the package's tensors divided by their number of weights."""
    kind = kind_of(path)
    if kind == "gguf":
        return _gguf_bits_per_weight(path)
    if kind in ("mlx", "hf"):
        return MlxFolder(path).bits_per_weight
    if kind == "onnx":
        return OnnxFolder(path).bits_per_weight
    from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint

    return DecodedCheckpoint(path).stored_bits_per_weight


def _gguf_bits_per_weight(path: str | Path) -> float:
    from optrot_edge.models.gguf_file import GGUFFile

    tensors = GGUFFile(path).tensors.values()
    weights = sum(prod(tensor.shape) for tensor in tensors)
    stored = sum(8 * tensor.row_bytes * prod(tensor.shape[:-1]) for tensor in tensors)
    return stored / weights if weights else 0.0
