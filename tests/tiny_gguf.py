"""Writes small GGUF files from Hugging Face folders with gguf-py alone, as an oracle for the reader."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """q or k rows in llama.cpp's RoPE order: row 2j + p of a head is row p * head_dim / 2 + j."""
    half = rows.shape[0] // heads // 2
    order = [head * 2 * half + p * half + j for head in range(heads) for j in range(half) for p in (0, 1)]
    return rows[order]


def gguf_tensors(folder: str | Path) -> dict[str, np.ndarray]:
    """float32 tensors of a saved (unsharded) tiny model by GGUF name, q and k rows interleaved."""
    config = json.loads((Path(folder) / "config.json").read_text())
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    model_arch = {name: arch_id for arch_id, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(model_arch, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        linear = name.split(".")[-2]
        if arch == "llama" and linear in heads:
            tensor = interleave(tensor, heads[linear])
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = tensor.astype(np.float32)
    return tensors


def write_gguf(path: str | Path, folder: str | Path, qtype=gguf.GGMLQuantizationType.F32,
               changes: dict | None = None, drop: tuple[str, ...] = (), extra: dict | None = None) -> Path:
    """Write the tiny model in `folder` as a GGUF whose matrices have `qtype`.

    `changes` maps metadata keys (without the arch prefix) to values, or to None to leave one out;
    `drop` are tensors left out, `extra` float32 tensors added or replaced.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or hidden // heads
    keys = {"block_count": config["num_hidden_layers"], "embedding_length": hidden,
            "context_length": config["max_position_embeddings"],
            "feed_forward_length": config["intermediate_size"], "attention.head_count": heads,
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": head_dim, "attention.value_length": head_dim,
            "rope.dimension_count": head_dim, "rope.freq_base": config["rope_parameters"]["rope_theta"],
            "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], **(changes or {})}
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array, bool: writer.add_bool}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"token{i}é" for i in range(config["vocab_size"])])
    writer.add_token_types([1] * config["vocab_size"])
    writer.add_token_scores([i / 7 for i in range(config["vocab_size"])])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }} ünï")
    for name, tensor in {**gguf_tensors(folder), **(extra or {})}.items():
        if name in drop:
            continue
        kind = qtype if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)
