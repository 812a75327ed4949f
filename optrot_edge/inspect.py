"""What a file or folder holds, without loading it. GGUFs, MLX and ONNX packages and checkpoints need no torch."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

from optrot_edge.checkpoint import QuantizedCheckpoint, chosen_by_auto, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.models.mlx_folder import MlxFolder, is_mlx
from optrot_edge.models.onnx_folder import OnnxFolder, is_onnx


def inspect_path(path: str | Path) -> dict:
    """A JSON-serialisable description of a checkpoint, GGUF, MLX or ONNX folder, Hugging Face model or rotation file.

    Raises InputError when it is none of them, or damaged.
    """
    path = Path(path)
    if (path / "optrot.json").is_file():
        return _checkpoint(path)
    if path.is_file():
        return _rotation(path) if path.suffix == ".safetensors" else _gguf(path)
    if path.is_dir() and is_onnx(path):
        return _onnx(path)
    if (path / "config.json").is_file() and is_mlx(path):
        return _mlx(path)
    return _model(path)


class _Types:
    """Counts tensors, weights and stored bits by type."""

    def __init__(self):
        self.table: dict[str, dict] = {}
        self.bits = 0.0

    def add(self, kind: str, weights: int, bits: float) -> None:
        entry = self.table.setdefault(kind, {"tensors": 0, "weights": 0})
        entry["tensors"] += 1
        entry["weights"] += weights
        self.bits += bits

    @property
    def bits_per_weight(self) -> float:
        return self.bits / max(1, sum(entry["weights"] for entry in self.table.values()))


def _checkpoint(path: Path) -> dict:
    manifest = QuantizedCheckpoint(path).manifest
    try:
        return _describe_checkpoint(path, manifest)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{path}/optrot.json is damaged or incomplete ({error!r}); quantise again") from None


def _describe_checkpoint(path: Path, manifest: dict) -> dict:
    types = _Types()
    halves = set(manifest.get("bfloat16") or ())
    for name, entry in manifest["tensors"].items():
        count, kind = prod(entry["shape"]), entry.get("grid") or ("bfloat16" if name in halves else entry["dtype"])
        width = (grid_spec(kind).bits_per_weight if "grid" in entry else 16 if name in halves
                 else 8 * np.dtype(kind).itemsize)
        types.add(kind, count, count * width)
    recipe = manifest["recipe"]
    return {"kind": "quantised checkpoint", "path": str(path), "family": manifest["model"]["family"],
            "name": manifest["model"]["name"], "layers": manifest["model"]["num_hidden_layers"],
            "rotation": manifest["rotation"]["rotation"], "applied": manifest["rotation"]["applied"],
            "scales": manifest["rotation"].get("scales", []), **chosen_by_auto(manifest),
            "quantizer": recipe["quantizer"], "calibration": recipe["calibration"], "seed": manifest["seed"],
            "bytes_packed": round(types.bits / 8), "bits_per_weight": types.bits_per_weight, "types": types.table,
            "notes": manifest.get("notes", []), "warnings": manifest.get("warnings", []),
            "damping_escalations": sum(r.get("damp_escalations", 0) for r in manifest["errors"].values()),
            "worse_than_rtn": [name for name, r in manifest["errors"].items() if r.get("worse_than_rtn")],
            "layers_snr_db": _layers(manifest)}


def _layers(manifest: dict) -> list[dict]:
    """The worst matrix of every layer that has an error: `snr_db`, `matrix`, and the layer's matrices with trouble."""
    layers: list[dict | None] = [None] * manifest["model"]["num_hidden_layers"]
    for name, report in manifest["errors"].items():
        if not name.startswith("layers.") or report["snr_db"] is None:
            continue
        index, matrix = int(name.split(".")[1]), name.split(".")[2]
        entry = layers[index] = layers[index] or {"snr_db": float("inf"), "worse_than_rtn": [], "damping_grew": []}
        if report["snr_db"] < entry["snr_db"]:
            entry |= {"snr_db": report["snr_db"], "matrix": matrix}
        if report.get("worse_than_rtn"):
            entry["worse_than_rtn"].append(matrix)
        if report.get("damp_escalations"):
            entry["damping_grew"].append(matrix)
    return [entry for entry in layers if entry]


def _gguf(path: Path) -> dict:
    from optrot_edge.models.gguf_file import GGUFFile
    from optrot_edge.models.gguf_r4 import base_architecture, read_r4_block

    file, types = GGUFFile(path), _Types()
    for info in file.tensors.values():
        types.add(info.type.name.lower(), prod(info.shape), 8 * info.row_bytes * prod(info.shape[:-1]))
    architecture, r4_block = file.value("general.architecture"), read_r4_block(file)
    arch = base_architecture(str(architecture))

    def plain(key: str):
        value = file.value(key)
        return value if isinstance(value, str | int | float) else None

    return {"kind": "GGUF", "path": str(path), "architecture": architecture, "name": plain("general.name"),
            "file_type": _file_type(plain("general.file_type")), "layers": plain(f"{arch}.block_count"),
            "hidden_size": plain(f"{arch}.embedding_length"), "context_length": plain(f"{arch}.context_length"),
            "tied_head": "output.weight" not in file.tensors if file.tensors else None,
            **({"r4_block": r4_block} if r4_block else {}),
            "tokenizer": plain("tokenizer.ggml.pre") or plain("tokenizer.ggml.model"),
            "parts": len(file.files), "bytes": file.size, "bytes_tensors": round(types.bits / 8),
            "bits_per_weight": types.bits_per_weight, "types": types.table}


def _mlx(path: Path) -> dict:
    folder, types = MlxFolder(path), _Types()
    for tensor in folder.tensors.values():
        types.add(tensor.kind, tensor.weights, tensor.bits)
    config, text, ours = folder.config, folder.text_config, folder.optrot
    about = {"rotation": ours.get("rotation")}
    about |= {name: ours[name] for name in ("applied", "scales", "r3_block", "r4_block") if name in ours}
    return {"kind": "MLX package", "path": str(path), "model_type": config.get("model_type"),
            "layers": text.get("num_hidden_layers"), "hidden_size": text.get("hidden_size"),
            "context_length": text.get("max_position_embeddings"), "tied_head": folder.tied_head, **about,
            "needs_trust_remote_code": config.get("model_file") is not None,
            "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            "bytes_tensors": round(types.bits / 8), "bits_per_weight": types.bits_per_weight, "types": types.table,
            "warnings": ours.get("warnings", [])}


def _onnx(path: Path) -> dict:
    folder, types = OnnxFolder(path), _Types()
    for tensor in folder.tensors.values():
        types.add(tensor.kind, tensor.weights, tensor.bits)
    decoder, ours = folder.decoder, folder.optrot
    named = ("applied", "scales", "r3_block", "r4_block", "execution_provider")
    return {"kind": "ONNX package", "path": str(path), "graph": folder.filename,
            "model_type": folder.genai["model"].get("type"), "layers": decoder.get("num_hidden_layers"),
            "hidden_size": decoder.get("hidden_size"), "context_length": folder.context_length,
            "rotation": ours.get("rotation"), **{name: ours[name] for name in named if name in ours},
            "opset": folder.opset, "accuracy_level": folder.accuracy_level,
            "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
            "bytes_tensors": round(types.bits / 8), "bits_per_weight": types.bits_per_weight, "types": types.table,
            "warnings": ours.get("warnings", [])}


def _file_type(number) -> str | None:
    from gguf import LlamaFileType

    if number is None:
        return None
    try:
        return LlamaFileType(number).name
    except ValueError:  # newer than the gguf installed here
        return f"unknown ({number})"


def _rotation(path: Path) -> dict:
    _needs_torch("a rotation file")
    from optrot_edge.rotations.rotation import Rotation, orthogonality_error

    rotation = Rotation.load(path)
    about = {"kind": "rotation", "path": str(path), **rotation.describe()}
    recipe = about.pop("recipe")
    about |= {k: v for k, v in recipe.items() if k not in about and not k.startswith(("layer_", "loss_curve"))}
    for name in ("r1", "r2"):
        matrix = getattr(rotation, name)
        if matrix is not None:
            about |= {f"{name}_shape": list(matrix.shape), f"{name}_orthogonality": orthogonality_error(matrix)}
    return about


def _needs_torch(what: str) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError(f'inspecting {what} needs torch: pip install "optrot-edge[learn]"') from None


def _model(path: Path) -> dict:
    if not path.exists():
        raise InputError(f"{path} not found; give a model folder, a checkpoint, a GGUF or a rotation file")
    _needs_torch("a Hugging Face model")
    from optrot_edge.models import open_model

    source = open_model(path)
    config = source.config.to_dict()
    del config["extra"]
    size = sum(file.stat().st_size for file in source.files)
    return {"kind": "Hugging Face model", "path": str(path), "bytes": size, **config}
