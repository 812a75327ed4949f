"""Reader of GGUF files: any type that gguf-py can dequantise, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from optrot_edge.errors import InputError
from optrot_edge.kernels.hadamard import block_hadamard
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import Family, get_gguf_family
from optrot_edge.models.gguf_file import ArrayInfo, GGUFFile, can_dequantize
from optrot_edge.models.gguf_r4 import base_architecture, read_r4_block
from optrot_edge.models.hf_config import positive_number
from optrot_edge.models.source import ModelSource

_ROPE_FREQS = "rope_freqs.weight"
_KEPT_KEYS = ("tokenizer.", "general.")
VOCAB_FILE = "vocab.gguf"


class GGUFSource(ModelSource):
    """A model in a GGUF, split or not; q and k rows are given in Hugging Face's RoPE order, and R4 is undone.

    Raises InputError when opened if anything but the values of the tensors is wrong.
    """

    kind = "gguf"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._file = GGUFFile(self.path)
        self.files = self._file.files
        self.family, self.config = parse_metadata(self._file)
        self._r4_block = read_r4_block(self._file)
        for kind in sorted({info.type for info in self._file.tensors.values()}):
            if not can_dequantize(kind):
                raise InputError(f"{self.path} holds {kind.name} tensors, which gguf-py cannot decode; "
                                 "convert the file to F16 or Q8_0 first")
        shapes = {name: info.shape for name, info in self._file.tensors.items()}
        self._check_tensors(shapes, self.family.gguf_name, ignored=[_ROPE_FREQS])

    def save_vocab(self, path: str | Path) -> Path:
        """Write a GGUF without tensors that holds every tokenizer.* and general.* key verbatim."""
        return self._file.write_metadata(path, _KEPT_KEYS)

    def save_tokenizer(self, folder: str | Path) -> list[Path]:
        """Write `vocab.gguf` into `folder` and return it in a list."""
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {folder}: {error}") from None
        return [self.save_vocab(Path(folder) / VOCAB_FILE)]

    def stored_dtype(self, name: str) -> str:
        """The tensor's type in the file's header."""
        return self._file.tensors[self.family.gguf_name(name)].type.name

    def _read(self, names: list[str], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        for name in names:
            tensor = torch.from_numpy(self._file.read(self.family.gguf_name(name)))
            linear = name.split(".")[-2]
            if self.family.gguf_permutes_qk and linear in heads:
                tensor = unpermute(tensor, heads[linear])
            elif self._r4_block and name.endswith("down_proj.weight"):
                tensor = block_hadamard(tensor, self._r4_block)  # its own inverse
            yield tensor.to(dtype)

    def _read_rows(self, name: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(self._file.read(self.family.gguf_name(name), rows=slice(start, stop))).to(dtype)


def unpermute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads * head_dim, ...] from llama.cpp's interleaved RoPE order to the half-split one."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def parse_metadata(file: GGUFFile) -> tuple[Family, ModelConfig]:
    """Family and validated ModelConfig of a GGUF header.

    Raises InputError for families, RoPE scalings and layouts that are not supported.
    """
    arch = file.value("general.architecture")
    if not isinstance(arch, str):
        raise InputError(f"{file.path}: general.architecture is missing; not a model")
    arch = base_architecture(arch)
    if file.value(f"{arch}.expert_count", 0) not in (0, 1):
        raise InputError(f"{file.path}: {arch} with experts cannot be rotated: mixtures of experts "
                         "are not supported yet")
    family = get_gguf_family(arch)
    hidden = _size(file, f"{arch}.embedding_length")
    heads = _size(file, f"{arch}.attention.head_count")
    head_dim = _head_dim(file, arch, hidden, heads)
    layers = _size(file, f"{arch}.block_count")
    theta = file.value(f"{arch}.rope.freq_base", 10000.0)
    config = ModelConfig(
        family=family.model_type, hidden_size=hidden,
        intermediate_size=_size(file, f"{arch}.feed_forward_length"), num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=_size(file, f"{arch}.attention.head_count_kv", heads), head_dim=head_dim,
        vocab_size=_vocab_size(file),
        rms_norm_eps=positive_number(file.value(f"{arch}.attention.layer_norm_rms_epsilon"), "rms_norm_eps"),
        rope_theta=positive_number(theta, "rope_theta"), rope_scaling=_rope_scaling(file, arch, head_dim),
        max_position_embeddings=_size(file, f"{arch}.context_length"),
        sliding_window=_size(file, f"{arch}.attention.sliding_window", 0) or None,
        tie_word_embeddings=family.gguf_name("lm_head.weight") not in file.tensors,
        name=str(file.value("general.name", "")), extra=_extra(file, family),
    )
    config.validate()
    return family, config


def _size(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = file.value(key, default)
    if isinstance(value, ArrayInfo):
        raise InputError(f"{file.path}: {key} differs by layer, which is not supported")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
        raise InputError(f"{file.path}: {key} is {value!r}; a size is needed")
    return value


def _head_dim(file: GGUFFile, arch: str, hidden: int, heads: int) -> int:
    if not heads:
        raise InputError(f"{file.path}: {arch}.attention.head_count is 0")
    head_dim = _size(file, f"{arch}.attention.key_length", hidden // heads)
    if f"{arch}.attention.key_length" not in file.entries and hidden % heads:
        raise InputError(f"{file.path}: {hidden} channels do not divide into {heads} heads")
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (size := _size(file, key, head_dim)) != head_dim:
            raise InputError(f"{file.path}: {key} is {size} but heads have {head_dim} channels; "
                             "only equal sizes are supported")
    return head_dim


def _vocab_size(file: GGUFFile) -> int:
    table, tokens = file.tensors.get("token_embd.weight"), file.value("tokenizer.ggml.tokens")
    if table is None or len(table.shape) != 2:
        raise InputError(f"{file.path}: tensor token_embd.weight is missing or not a matrix; "
                         "this GGUF holds no model")
    if isinstance(tokens, ArrayInfo) and tokens.count != table.shape[0]:
        raise InputError(f"{file.path}: {tokens.count} tokens but {table.shape[0]} embedding rows")
    return table.shape[0]


def _rope_scaling(file: GGUFFile, arch: str, head_dim: int) -> dict | None:
    kind = file.value(f"{arch}.rope.scaling.type", "none")
    if kind == "none" and f"{arch}.rope.scale_linear" in file.entries:  # written before GGUF version 3
        kind = "linear"
    if kind not in ("none", "linear"):
        raise InputError(f"{file.path}: rope scaling {kind!r} is not supported; none, linear and "
                         f"{_ROPE_FREQS} (Llama 3) are")
    scaling = None
    if kind == "linear":
        factor = file.value(f"{arch}.rope.scaling.factor", file.value(f"{arch}.rope.scale_linear", 1.0))
        factor = positive_number(factor, "rope.scaling.factor")
        scaling = None if factor == 1 else {"rope_type": "linear", "factor": factor}
    if _ROPE_FREQS not in file.tensors:
        return scaling
    info = file.tensors[_ROPE_FREQS]
    if info.shape != (head_dim // 2,) or not can_dequantize(info.type):
        raise InputError(f"{file.path}: {_ROPE_FREQS} is {list(info.shape)} {info.type.name} but heads "
                         f"of {head_dim} channels need [{head_dim // 2}] floats")
    factors = file.read(_ROPE_FREQS)
    if not np.isfinite(factors).all() or factors.min() <= 0:
        raise InputError(f"{file.path}: {_ROPE_FREQS} holds values that are not positive")
    if scaling:
        raise InputError(f"{file.path}: linear rope scaling and {_ROPE_FREQS} together are not supported")
    return {"rope_type": "factors", "factors": factors.tolist()}


def _extra(file: GGUFFile, family: Family) -> dict:
    """Bias flags by what layer 0 holds, token ids, and the general.* keys that JSON can carry."""
    extra: dict = {}
    for flag, linears in family.optional_biases.items():
        if any(family.gguf_name(f"layers.0.{linear}.bias") in file.tensors for linear in linears):
            extra[flag] = True
    for key in ("bos", "eos", "padding"):
        if isinstance(value := file.value(f"tokenizer.ggml.{key}_token_id"), int):
            extra[f"{key.replace('padding', 'pad')}_token_id"] = value
    extra["general"] = {
        key: entry.value for key, entry in file.entries.items() if key.startswith("general.")
        and not isinstance(entry.value, ArrayInfo)
        and not (isinstance(entry.value, float) and not math.isfinite(entry.value))}
    return extra
