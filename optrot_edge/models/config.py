"""The shape of a decoder, normalised from a Hugging Face config.json or from GGUF metadata."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from optrot_edge.errors import InputError


@dataclass
class ModelConfig:
    """What the forward pass, the rotations and the exporters need to know of a model.

    `rope_scaling` is None or one of
    `{"rope_type": "linear", "factor": float}`,
    `{"rope_type": "llama3", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings"}`, or
    `{"rope_type": "factors", "factors": [head_dim / 2 floats]}` (a GGUF `rope_freqs.weight`).
    """

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    name: str = ""
    extra: dict = field(default_factory=dict)  # e.g. bos/eos ids, general.* metadata of the source
    head_mix: bool = False  # the head is the embedding, read through a matrix after the final norm

    @property
    def query_groups(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    def validate(self) -> None:
        """Raise InputError if the numbers cannot describe a decoder."""
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise InputError(f"config: {key} is {value!r}; a positive integer is needed")
        for key in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise InputError(f"config: {key} is {value!r}; a positive number is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"config: {self.num_attention_heads} attention heads cannot share "
                             f"{self.num_key_value_heads} key/value heads evenly")
        if self.head_mix and not self.tie_word_embeddings:
            raise InputError("config: head_mix is set, but the head is not tied to the embedding")
        if self.head_dim % 2:
            raise InputError(f"config: head_dim {self.head_dim} is odd; RoPE needs an even one")

    def rope_inv_freq(self) -> list[float]:
        """RoPE's inverse frequencies after scaling, [head_dim / 2], radians per position."""
        factors = self.rope_freq_factors() or [1.0] * (self.head_dim // 2)
        base = [self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2)]
        scale = self.rope_scaling["factor"] if (self.rope_scaling or {}).get("rope_type") == "linear" else 1.0
        return [b / (f * scale) for b, f in zip(base, factors, strict=True)]

    def rope_freq_factors(self) -> list[float] | None:
        """What llama.cpp stores as `rope_freqs.weight` (divides the inverse frequencies), or None."""
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type")
        if kind == "factors":
            return list(scaling["factors"])
        if kind != "llama3":
            return None
        # Llama 3.1 model card: long wavelengths are stretched by `factor`, short ones kept,
        # and the band between interpolated.
        factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
        context = scaling["original_max_position_embeddings"]
        factors = []
        for i in range(self.head_dim // 2):
            wavelength = 2 * math.pi * self.rope_theta ** (2 * i / self.head_dim)
            if wavelength < context / high:
                factors.append(1.0)
            elif wavelength > context / low:
                factors.append(float(factor))
            else:
                smooth = (context / wavelength - low) / (high - low)
                factors.append(1.0 / ((1 - smooth) / factor + smooth))
        return factors

    def to_dict(self) -> dict:
        """A JSON-serialisable copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> ModelConfig:
        """Inverse of `to_dict`; InputError on unknown or missing keys."""
        try:
            config = cls(**data)
        except TypeError as error:
            raise InputError(f"model config: {error}") from None
        config.validate()
        return config
