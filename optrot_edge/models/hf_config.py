"""A Hugging Face config.json, of transformers 4 or 5, as a ModelConfig. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family, get_family

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
          "max_position_embeddings")
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict:
    """The JSON object in `path`; InputError if it is missing, damaged or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; a Hugging Face model folder needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return data


def positive_number(value, what: str) -> float:
    """`value` as a finite positive float; InputError naming `what` otherwise."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and number > 0:
            return number
    raise InputError(f"config: {what} is {value!r}; a positive number is needed")


def parse_config(data: dict, name: str) -> tuple[Family, ModelConfig]:
    """Family and validated ModelConfig of a config.json's content; `name` is the model's fallback name.

    Raises InputError for unsupported families, activations, RoPE scalings and quantised models.
    """
    family = _family(data)
    for key in ("quantization_config", "quantization", "compression_config"):
        if data.get(key):
            raise InputError(f"the model is already quantised ({key} in config.json); "
                             "use its float original")
    if (activation := data.get("hidden_act", "silu")) != "silu":
        raise InputError(f"config: hidden_act {activation!r} is not supported; only 'silu' is")
    for key in _SIZES:
        if data.get(key) is None:
            raise InputError(f"config.json: {key} is missing")
    theta, scaling = _rope(data, family)
    heads = data["num_attention_heads"]
    kv_heads = data.get("num_key_value_heads")
    config = ModelConfig(
        family=family.model_type,
        **{key: data[key] for key in _SIZES},
        num_key_value_heads=heads if kv_heads is None else kv_heads,
        head_dim=_head_dim(data, family),
        rms_norm_eps=positive_number(data.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_theta=theta, rope_scaling=scaling,
        tie_word_embeddings=_flag(data, "tie_word_embeddings", family.tie_word_embeddings),
        name=name, extra=_extra(data, family),
    )
    config.validate()
    config.sliding_window = _window(data, family, config.num_hidden_layers)
    return family, config


def _family(data: dict) -> Family:
    model_type, architectures = data.get("model_type") or "", data.get("architectures") or []
    if (not isinstance(model_type, str) or not isinstance(architectures, list)
            or not all(isinstance(name, str) for name in architectures)):
        raise InputError("config.json: model_type must be a string and architectures a list of strings")
    return get_family(model_type, architectures)


def _flag(data: dict, key: str, default: bool = False) -> bool:
    value = data.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise InputError(f"config: {key} is {value!r}; true or false is needed")
    return value


def _head_dim(data: dict, family: Family) -> int:
    head_dim = data.get("head_dim") or family.default_head_dim
    if head_dim is not None:
        return head_dim
    hidden, heads = data["hidden_size"], data["num_attention_heads"]
    if not isinstance(hidden, int) or not isinstance(heads, int) or heads <= 0 or hidden % heads:
        raise InputError(f"config: hidden_size {hidden!r} does not divide into "
                         f"{heads!r} attention heads, and there is no head_dim")
    return hidden // heads


def _rope(data: dict, family: Family) -> tuple[float, dict | None]:
    """RoPE base and scaling from `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    parameters, scaling = data.get("rope_parameters") or {}, data.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise InputError("config: rope_parameters and rope_scaling must be objects")
    if any(isinstance(value, dict) for value in parameters.values()):
        raise InputError("config: rope_parameters of each kind of layer are not supported; only one for all layers is")
    if parameters and any(parameters.get(key) != value for key, value in scaling.items() if key != "type"):
        raise InputError("config: rope_scaling and rope_parameters say different things; put what is to hold into "
                         "rope_parameters, and leave rope_scaling out")
    scaling = parameters or scaling
    theta = parameters.get("rope_theta", data.get("rope_theta"))
    theta = positive_number(10000.0 if theta is None else theta, "rope_theta")
    partial = parameters.get("partial_rotary_factor", data.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise InputError(f"config: partial_rotary_factor {partial!r} is not supported; only 1 is")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in family.rope_scalings:
        raise InputError(f"config: rope scaling {kind!r} is not supported; "
                         f"{family.model_type} can have {', '.join(family.rope_scalings)}")
    keys = _LLAMA3 if kind == "llama3" else ("factor",)
    numbers = {key: positive_number(scaling.get(key), f"rope scaling's {key}") for key in keys}
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        raise InputError("config: rope scaling's high_freq_factor must exceed its low_freq_factor")
    return theta, {"rope_type": kind, **numbers}


def _window(data: dict, family: Family, layers: int) -> int | None:
    """Sliding window that every layer shares, in tokens, or None."""
    window, switch = data.get("sliding_window"), family.sliding_window
    if window is None or switch is None or (switch != "sliding_window" and not _flag(data, switch)):
        return None
    if not isinstance(window, int) or isinstance(window, bool) or window <= 0:
        raise InputError(f"config: sliding_window is {window!r}; a positive integer or null is needed")
    if switch == "sliding_window":
        return window
    kinds = data.get("layer_types")
    if isinstance(kinds, list):
        windowed = sum(kind == "sliding_attention" for kind in kinds)
        total = len(kinds)
    else:
        first = data.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise InputError(f"config: max_window_layers is {first!r}; an integer is needed")
        windowed, total = layers - min(max(first, 0), layers), layers
    if 0 < windowed < total:
        raise InputError("config: a sliding window in some layers only is not supported; "
                         "set use_sliding_window to false to attend to the whole context")
    return window if windowed else None


def _extra(data: dict, family: Family) -> dict:
    extra = {flag: True for flag in family.optional_biases if _flag(data, flag)}
    for key in _TOKEN_IDS:
        value = data.get(key)
        ids = value if isinstance(value, list) else [value]
        if value is None or not ids:
            continue
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise InputError(f"config: {key} is {value!r}; a token id or a list of them is needed")
        extra[key] = value
    return extra
