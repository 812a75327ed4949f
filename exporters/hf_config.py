"""config.json of a model in float, as Hugging Face's readers know it: in the keys of transformers 4, which all read."""

from __future__ import annotations

from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family


def hf_config(family: Family, config: ModelConfig) -> dict:
    """Hugging Face's configuration of a model; a GGUF's table of RoPE factors becomes `longrope` with the same factors
    throughout."""
    about = {
        "model_type": family.model_type, "architectures": [family.hf_class], "hidden_act": "silu",
        **{name: getattr(config, name) for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings")},
        "rope_scaling": _rope_scaling(config),
        **{flag: bool(config.extra.get(flag)) for flag in family.optional_biases},
    }
    if family.sliding_window is not None:
        about["sliding_window"] = config.sliding_window
        if family.sliding_window != "sliding_window":
            about[family.sliding_window] = config.sliding_window is not None
            about["max_window_layers"] = 0 if config.sliding_window else config.num_hidden_layers
    ids = {f"{name}_token_id": config.extra.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return about | {name: value for name, value in ids.items() if value is not None}


def _rope_scaling(config: ModelConfig) -> dict | None:
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] != "factors":
        return scaling
    return {"rope_type": "longrope", "short_factor": scaling["factors"], "long_factor": scaling["factors"],
            "original_max_position_embeddings": config.max_position_embeddings}
