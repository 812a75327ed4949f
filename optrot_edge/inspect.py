"""What a file or folder holds, without loading it."""

from __future__ import annotations

from pathlib import Path

from optrot_edge.checkpoint import QuantizedCheckpoint, grid_spec
from optrot_edge.errors import InputError


def inspect_path(path: str | Path) -> dict:
    """A JSON-serialisable description of a checkpoint folder, GGUF, Hugging Face model or rotation file.

    Raises InputError when it is none of them, or damaged.
    """
    path = Path(path)
    if (path / "optrot.json").is_file():
        return _checkpoint(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _rotation(path)
    return _model(path)


def _checkpoint(path: Path) -> dict:
    checkpoint = QuantizedCheckpoint(path)
    manifest, types = checkpoint.manifest, {}
    bits = 0.0
    for entry in manifest["tensors"].values():
        count = 1
        for size in entry["shape"]:
            count *= size
        kind = entry.get("grid") or entry["dtype"]
        bits += count * (grid_spec(kind).bits_per_weight if "grid" in entry else int(kind[-2:]))
        types.setdefault(kind, {"tensors": 0, "weights": 0})
        types[kind]["tensors"] += 1
        types[kind]["weights"] += count
    weights = sum(entry["weights"] for entry in types.values())
    layers = [None] * manifest["model"]["num_hidden_layers"]
    for name, report in manifest["errors"].items():
        if name.startswith("layers.") and report["snr_db"] is not None:
            index = int(name.split(".")[1])
            if layers[index] is None or report["snr_db"] < layers[index]["snr_db"]:
                layers[index] = {"snr_db": report["snr_db"], "matrix": name.split(".")[2]}
    recipe = manifest["recipe"]
    return {"kind": "quantised checkpoint", "path": str(path), "family": manifest["model"]["family"],
            "name": manifest["model"]["name"], "layers": manifest["model"]["num_hidden_layers"],
            "rotation": manifest["rotation"]["rotation"], "applied": manifest["rotation"]["applied"],
            "quantizer": recipe["quantizer"], "calibration": recipe["calibration"], "seed": manifest["seed"],
            "bytes_packed": round(bits / 8), "bits_per_weight": bits / weights, "types": types,
            "damping_escalations": sum(r.get("damp_escalations", 0) for r in manifest["errors"].values()),
            "seconds": manifest["seconds"], "layers_snr_db": [entry for entry in layers if entry]}


def _rotation(path: Path) -> dict:
    from optrot_edge.rotations.rotation import Rotation, orthogonality_error

    rotation = Rotation.load(path)
    about = {"kind": "rotation", "path": str(path), **rotation.describe()}
    recipe = about.pop("recipe")
    about |= {key: value for key, value in recipe.items() if not key.startswith("layer_")}
    for name in ("r1", "r2"):
        matrix = getattr(rotation, name)
        if matrix is not None:
            about |= {f"{name}_shape": list(matrix.shape), f"{name}_orthogonality": orthogonality_error(matrix)}
    return about


def _model(path: Path) -> dict:
    if not path.exists():
        raise InputError(f"{path} not found; give a model folder, a checkpoint, a GGUF or a rotation file")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise InputError('inspecting models needs torch: pip install "optrot-edge[learn]"') from None
    from optrot_edge.models import open_model

    source = open_model(path)
    config = source.config.to_dict()
    extra = config.pop("extra")
    size = sum(file.stat().st_size for file in source.files)
    return {"kind": f"model ({source.kind})", "path": str(path), "bytes": size, **config,
            "general": {k: v for k, v in extra.get("general", {}).items() if isinstance(v, str | int | float)}}
