"""MLX folders of tiny float models, written without the exporter, and what mlx-lm makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from optrot_edge.models import open_model
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX, get_family
from optrot_edge.models.forward import head_mix
from optrot_edge.rotations.fuse import packaged
from optrot_edge.rotations.optrot import initial_rotation

MODEL_FILE = Path(__file__).parents[2] / "exporters" / "mlx_model_file.py"


def rotated_model(folder: Path, which: str = "r1,r2", seed: int = 0, **blocks):
    """The model in `folder` and itself under Hadamard rotations, as a package has it."""
    source = open_model(folder)
    rotation = initial_rotation(source.config, set(which.split(",")), torch.Generator().manual_seed(seed), **blocks)
    return source, packaged(source, rotation)


def mlx_config(config: ModelConfig) -> dict:
    """What mlx-lm's own models read of config.json."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings",
             "rope_scaling")
    bias = {name: config.extra.get(name, False) for name in ("attention_bias", "mlp_bias")}
    return {"model_type": config.family, **{name: getattr(config, name) for name in names}, **bias}


def optrot_entry(model) -> dict:
    """config.json's "optrot" of a rotated model."""
    return {"format_version": 1, "r3_block": model.r3_block, "r4_block": model.r4_block,
            "head_mix": model.config.head_mix}


def write_folder(path: Path, model, *, dtype=torch.float32, optrot: dict | None = None, more: dict | None = None,
                 tokenizer: Path | None = None) -> Path:
    """A package of `model`'s float weights with its model file; `optrot` and `more` are other entries of config.json.

    `tokenizer` is a folder to copy one from.
    """
    path.mkdir(parents=True)
    config = mlx_config(model.config) | {"model_file": "optrot_model.py", "optrot": optrot or optrot_entry(model)}
    (path / "config.json").write_text(json.dumps(config | (more or {})))
    shutil.copyfile(MODEL_FILE, path / "optrot_model.py")
    tensors = {"embed_tokens.weight": model.embedding(dtype), "norm.weight": model.final_norm(dtype)}
    if (head := model.lm_head(dtype)) is not None:
        tensors["lm_head.weight"] = head
    for index in range(model.config.num_hidden_layers):
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in model.layer(index, dtype).items()}
    family = get_family(model.config.family)
    tensors = {family.hf_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    if (mix := head_mix(model, dtype)) is not None:
        tensors[HEAD_MIX] = mix.contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "mlx"})
    for file in ([] if tokenizer is None else tokenizer.glob("*token*")):
        shutil.copyfile(file, path / file.name)
    return path


def load(path, **options):
    """mlx-lm's model of a folder with a tokenizer."""
    import mlx_lm

    return mlx_lm.load(str(path), trust_remote_code=True, **options)[0]


def load_model(path):
    """The same of a folder without."""
    from mlx_lm.utils import load_model

    return load_model(path, trust_remote_code=True)[0]


def logits(model, tokens) -> np.ndarray:
    """Logits float32 [batch, length, vocab] of a loaded model, without a cache."""
    import mlx.core as mx

    return np.array(model(mx.array(tokens.numpy())).astype(mx.float32))


def cached_logits(model, tokens, first: int = 1, kv_bits: int | None = None) -> np.ndarray:
    """With a cache: the `first` tokens at once, then one at a time, the cache quantised after the first."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    cache, parts, ids = make_prompt_cache(model), [], mx.array(tokens.numpy())
    for start, stop in [(0, first), *((i, i + 1) for i in range(first, ids.shape[1]))]:
        parts.append(np.array(model(ids[:, start:stop], cache=cache)))
        if kv_bits and start == 0:
            cache = [layer.to_quantized(group_size=32, bits=kv_bits) for layer in cache]
    return np.concatenate(parts, axis=1)
