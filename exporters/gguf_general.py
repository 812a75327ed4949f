"""general.* and optrot.*: what a GGUF says about its model and about how it was made."""

from __future__ import annotations

from pathlib import Path

from gguf import GGML_QUANT_VERSION
from gguf.constants import LlamaFileType
from gguf.utility import size_label

from optrot_edge.exporters.gguf_entries import Entries, read_entries, string, u32, u64
from optrot_edge.models.model_card import CARD_FILE

_DECIDED = {f"general.{key}" for key in ("architecture", "type", "name", "file_type", "quantization_version",
                                         "alignment", "quantized_by")}


def general_entries(arch: str, file_type: LlamaFileType, weights: int, folder: Path,
                    name: str | None, fallback: str) -> Entries:
    """general.*: those of the source GGUF, or of the Hugging Face folder's model card, except what the export decides.

    `folder` is where the tokenizer was saved, `name` what to call the model, `fallback` the same where neither that nor
    the source says. The size label is counted from `weights`, unless the name of a Hugging Face model holds one.
    """
    source, decided = {}, set(_DECIDED)
    if (folder / "vocab.gguf").is_file():
        source = read_entries(folder / "vocab.gguf")
        decided.add("general.size_label")
    elif (folder / CARD_FILE).is_file():
        source = read_entries(folder / CARD_FILE)
    head: Entries = {"general.architecture": string(arch), "general.type": string("model")}
    if name or (fallback and "general.name" not in source):
        head["general.name"] = string(name or fallback)
    elif "general.name" in source:
        head["general.name"] = source["general.name"]
    entries = {key: value for key, value in source.items() if key.startswith("general.") and key not in decided}
    return head | {"general.size_label": string(size_label(weights, weights, 0, 0))} | entries | {
        "general.file_type": u32(file_type), "general.quantization_version": u32(GGML_QUANT_VERSION)}


def method_entries(manifest: dict) -> Entries:
    """optrot.*: how the weights were made, as far as the checkpoint's manifest says. Runtimes ignore these keys."""
    rotation, recipe = manifest.get("rotation") or {}, manifest.get("recipe") or {}
    values = {
        "version": (manifest.get("versions") or {}).get("optrot-edge"),
        "rotation": rotation.get("rotation"),
        "rotation.applied": ",".join(rotation.get("applied") or []) or None,
        "rotation.scales": ",".join(rotation.get("scales") or []) or None,
        "quantizer": recipe.get("quantizer"),
        "seed": manifest.get("seed"),
        "calibration.sha256": manifest.get("calibration_sha256"),
        "calibration.windows": recipe.get("nsamples") if manifest.get("calibration_sha256") else None,
        "calibration.window_tokens": recipe.get("seqlen") if manifest.get("calibration_sha256") else None,
    }
    number = lambda value: u32(value) if value < 2**32 else u64(value)  # noqa: E731
    return {f"optrot.{key}": number(value) if isinstance(value, int) else string(value)
            for key, value in values.items() if value is not None}
