"""What a decoder family is: a declarative record, one per file of this folder, and its look-up.

Canonical tensor names: `embed_tokens.weight`, `norm.weight`, `lm_head.weight`, and per layer
`layers.{i}.` + `attn_norm`, `{q,k,v,o}_proj`, `q_norm`, `k_norm`, `mlp_norm`, `{gate,up,down}_proj`
with `.weight` or `.bias`. Linears are [out, in]. Only rotated models have `head_mix.weight` [hidden, hidden], the
linear between the final norm and a head that is tied through it. Imports neither torch nor gguf.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

from optrot_edge.errors import InputError
from optrot_edge.models.config import ModelConfig

HEAD_MIX = "head_mix.weight"  # neither Hugging Face's models nor GGUF have such a tensor
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # each a module of this folder with a FAMILY

HF_NAMES = {
    "embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm", "q_proj": "model.layers.{i}.self_attn.q_proj",
    "k_proj": "model.layers.{i}.self_attn.k_proj", "v_proj": "model.layers.{i}.self_attn.v_proj",
    "o_proj": "model.layers.{i}.self_attn.o_proj", "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate_proj": "model.layers.{i}.mlp.gate_proj", "up_proj": "model.layers.{i}.mlp.up_proj",
    "down_proj": "model.layers.{i}.mlp.down_proj",
}
GGUF_NAMES = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    "attn_norm": "blk.{i}.attn_norm", "q_proj": "blk.{i}.attn_q", "k_proj": "blk.{i}.attn_k",
    "v_proj": "blk.{i}.attn_v", "o_proj": "blk.{i}.attn_output", "mlp_norm": "blk.{i}.ffn_norm",
    "gate_proj": "blk.{i}.ffn_gate", "up_proj": "blk.{i}.ffn_up", "down_proj": "blk.{i}.ffn_down",
}
# Names of the per-head norms, for the families that have them.
QK_NORM_HF = {name: f"model.layers.{{i}}.self_attn.{name}" for name in ("q_norm", "k_norm")}
QK_NORM_GGUF = {name: f"blk.{{i}}.attn_{name}" for name in ("q_norm", "k_norm")}


@dataclass(frozen=True)
class Family:
    """One pre-norm decoder family: its names, and what a rotation must know of its wiring.

    `biases` are the linears that always have one; `optional_biases` maps a config flag (kept in
    `ModelConfig.extra`) to the linears that have one when it is set. `norms` maps each per-layer
    norm to the linears that read its output. `gguf_biases` are the ones llama.cpp's graph adds.
    """

    model_type: str
    hf_class: str
    gguf_arch: str
    hf_names: dict[str, str] = field(default_factory=lambda: dict(HF_NAMES))
    gguf_names: dict[str, str] = field(default_factory=lambda: dict(GGUF_NAMES))
    reads_residual: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    writes_residual: tuple[str, ...] = ("o_proj", "down_proj")
    norms: dict[str, tuple[str, ...]] = field(default_factory=lambda: {
        "attn_norm": ("q_proj", "k_proj", "v_proj"), "mlp_norm": ("gate_proj", "up_proj")})
    biases: tuple[str, ...] = ()
    optional_biases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_biases: tuple[str, ...] = ()
    qk_norms: bool = False
    gguf_permutes_qk: bool = False  # llama.cpp's interleaved RoPE order instead of half-split
    rope_scalings: tuple[str, ...] = ("linear", "llama3")
    sliding_window: str | None = None  # config key that switches the window on; None: no window
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    tie_word_embeddings: bool = False  # when config.json does not say

    def hf_name(self, name: str) -> str:
        """Hugging Face name of a canonical one, `layers.3.q_proj.bias` for example."""
        return _translate(name, self.hf_names)

    def gguf_name(self, name: str) -> str:
        """GGUF name of a canonical one."""
        return _translate(name, self.gguf_names)

    def bias_linears(self, config: ModelConfig) -> tuple[str, ...]:
        """The linears of a layer that carry a bias in this model."""
        optional = [linear for flag, linears in self.optional_biases.items()
                    if config.extra.get(flag) for linear in linears]
        return tuple(dict.fromkeys([*self.biases, *optional]))

    def layer_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Canonical names (without `layers.{i}.`) and shapes of one layer's tensors."""
        hidden, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        linears = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden),
                   "o_proj": (hidden, queries), "gate_proj": (ffn, hidden), "up_proj": (ffn, hidden),
                   "down_proj": (hidden, ffn)}
        shapes = {f"{name}.weight": (hidden,) for name in self.norms}
        shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"{name}.bias": linears[name][:1] for name in self.bias_linears(config)}
        if self.qk_norms:
            shapes |= {"q_norm.weight": (head,), "k_norm.weight": (head,)}
        return shapes

    def outer_shapes(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes of what is not in a layer; no `lm_head.weight` when tied."""
        table = (config.vocab_size, config.hidden_size)
        shapes = {"embed_tokens.weight": table, "norm.weight": (config.hidden_size,)}
        if config.head_mix:
            shapes[HEAD_MIX] = (config.hidden_size, config.hidden_size)
        return shapes if config.tie_word_embeddings else shapes | {"lm_head.weight": table}


def _translate(name: str, names: dict[str, str]) -> str:
    *prefix, stem, kind = name.split(".")
    return f"{names[stem]}.{kind}".format(i=prefix[1] if prefix else None)


def get_family(model_type: str, architectures: list[str] | None = None) -> Family:
    """The family of a Hugging Face `model_type` (or of `architectures`, when there is none).

    Raises InputError for a family that cannot be rotated, saying why and what is supported.
    """
    if not model_type and architectures:
        matches = [f for f in all_families() if f.hf_class in architectures]
        model_type = matches[0].model_type if matches else architectures[0]
    if model_type not in FAMILIES:
        raise InputError(_refusal(model_type))
    family = _load(model_type)
    if architectures and family.hf_class not in architectures:
        raise InputError(f"{architectures[0]} is not a causal language model; {model_type} needs "
                         f"{family.hf_class}")
    return family


def get_gguf_family(arch: str) -> Family:
    """The family of a GGUF `general.architecture`; Mistral files say `llama` too."""
    for family in all_families():
        if family.gguf_arch == arch:
            return family
    raise InputError(_refusal(arch))


def all_families() -> list[Family]:
    """Every supported family; llama first, which GGUF's `llama` resolves to."""
    return [_load(name) for name in FAMILIES]


def _load(model_type: str) -> Family:
    return importlib.import_module(f"optrot_edge.models.{model_type}").FAMILY


_POST_NORM = ("gemma2", "gemma3", "gemma3n", "gemma4", "olmo2", "olmo3", "glm4", "exaone4")
_EXPERTS = ("moe", "mixtral", "deepseek", "llama4", "gpt_oss", "gpt-oss", "dbrx", "jamba", "grok",
            "kimi", "minimax")
_WHY = {
    "gemma": "its norms scale by 1 + weight and it uses GELU",
    "smollm3": "some of its layers have no RoPE",
    "phi3": "its q/k/v and gate/up weights are stored fused",
    "cohere": "attention and MLP share one LayerNorm",
    "falcon": "attention and MLP share one LayerNorm",
    "gpt2": "it uses LayerNorm and learned positions", "gpt_neox": "it uses LayerNorm",
    "mamba": "it is not a transformer", "rwkv": "it is not a transformer",
}


def _refusal(name: str) -> str:
    flat = name.lower().removesuffix("forcausallm")
    if any(flat.startswith(prefix) for prefix in _POST_NORM):
        why = "it has norms after attention and MLP, before the residual add, so R1 cannot be fused there"
    elif any(mark in flat for mark in _EXPERTS):
        why = "it is a mixture of experts, which is not supported yet"
    else:
        why = next((text for key, text in _WHY.items() if flat.startswith(key)),
                   "its wiring is not described here")
    supported = "llama (Llama 2/3, SmolLM, SmolLM2, TinyLlama), mistral, qwen2 (Qwen2, Qwen2.5), qwen3"
    return f"model family {name!r} cannot be rotated: {why}; supported: {supported}"
