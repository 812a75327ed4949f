"""What a checkpoint depends on: a run may go on only where none of it has changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from optrot_edge.journal import sha256
from optrot_edge.recipe import ROTATIONS, Recipe

NOT_SHAPING = ("max_memory",)  # fields of a Recipe that change nothing about the result


def shaping_fields(recipe: Recipe, device: str) -> dict:
    """The recipe as manifests record it; `device` is the one in use."""
    fields = dataclasses.asdict(recipe) | {"device": device}
    return {name: value for name, value in fields.items() if name not in NOT_SHAPING}


def fingerprint(source, recipe: Recipe, device: str, text_sha256: str | None, rotation=None) -> dict:
    """JSON of all that shapes a checkpoint of the open model `source`; `rotation` is one made before.

    Model files count by content, and so do the calibration text and a saved rotation. The processor counts because
    sums of floats depend on how they are split among threads and vector lanes.
    """
    from optrot_edge.rotating import versions

    made = None if rotation is None else rotation_digest(rotation)
    if recipe.rotation not in (*ROTATIONS, "auto"):
        made = sha256(recipe.rotation)
    return {"recipe": shaping_fields(recipe, device), "model": source.config.name,
            "files": {path.name: sha256(path) for path in source.files}, "text": text_sha256, "rotation": made,
            "versions": versions(), "processor": processor(device)}


def processor(device: str) -> dict:
    """What decides the order of floating-point sums on `device`."""
    import torch

    found = {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    if device.startswith("cuda"):
        found["GPU"] = torch.cuda.get_device_name(device)
    return found


def rotation_digest(rotation) -> str:
    """SHA-256 of a Rotation's tensors and description."""
    from safetensors.torch import save

    tensors = {name: tensor for name, tensor in (("r1", rotation.r1), ("r2", rotation.r2)) if tensor is not None}
    tensors |= {f"scale.{name}": scale for name, scale in rotation.scales.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return hashlib.sha256(save(tensors) + json.dumps(rotation.describe()).encode()).hexdigest()


def differences(before: dict, now: dict) -> list[str]:
    """What changed from one fingerprint to another, in words; empty when they are equal."""
    said = []
    for part in ("recipe", "files", "versions", "processor"):
        old, new = before.get(part, {}), now[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                said.append(_change(part, name, old.get(name), new.get(name)))
    if before.get("model") != now["model"]:
        said.append(f"the model was called {before.get('model')}, now it is {now['model']}")
    if before.get("text") != now["text"]:
        said.append("the calibration text has changed")
    if before.get("rotation") != now["rotation"]:
        said.append("the rotation that was given has changed")
    return said


def _change(part: str, name: str, old, new) -> str:
    if part == "files":
        return f"the model's file {name} " + ("is new" if old is None else "is gone" if new is None else "has changed")
    label = "--" + name.replace("_", "-") if part == "recipe" else name
    hint = " (set OMP_NUM_THREADS)" if name == "threads" else ""
    return f"{label} was {old}, now it is {new}{hint}"
