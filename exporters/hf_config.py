"""config.json of a package: the model as Hugging Face's readers know it, and what the package itself says."""

from __future__ import annotations

from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family


def hf_config(family: Family, config: ModelConfig) -> dict:
    """Hugging Face's configuration of a model, in the keys of transformers 4, which every reader knows."""
    about = {
        "model_type": family.model_type, "architectures": [family.hf_class], "hidden_act": "silu",
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config), "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **{flag: bool(config.extra.get(flag)) for flag in family.optional_biases},
    }
    ids = {f"{name}_token_id": config.extra.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return about | {name: value for name, value in ids.items() if value is not None}


def _rope_scaling(config: ModelConfig) -> dict | None:
    """RoPE scaling; a GGUF's table of factors is `longrope` with the same factors throughout."""
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "factors":
        return scaling
    return {"rope_type": "longrope", "short_factor": scaling["factors"], "long_factor": scaling["factors"],
            "original_max_position_embeddings": config.max_position_embeddings}


def about_package(manifest: dict, config: ModelConfig, format: str, version: int) -> dict:
    """The package's own entry: what it was made by, and what its runtime must do."""
    rotation, recipe = manifest.get("rotation") or {}, manifest.get("recipe") or {}
    kept = ("rotation", "rotate", "quantizer", "calibration", "nsamples", "seqlen", "seed", "distill")
    return {"format_version": version, "format": format,
            "version": (manifest.get("versions") or {}).get("optrot-edge"),
            "rotation": rotation.get("rotation"), "applied": rotation.get("applied", []),
            "scales": rotation.get("scales", []), "r3_block": rotation.get("r3_block"),
            "r4_block": rotation.get("r4_block"), "head_mix": config.head_mix,
            "recipe": {name: recipe[name] for name in kept if name in recipe},
            "calibration_sha256": manifest.get("calibration_sha256"), "warnings": manifest.get("warnings", [])}
