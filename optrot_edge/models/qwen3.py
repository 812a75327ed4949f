"""Qwen3 (dense): an RMSNorm per query and key head between projection and RoPE; its own head_dim.

The q/k norms act inside a head, after the linears, so R1 and R2 never meet them.
"""

from optrot_edge.models.family import GGUF_NAMES, HF_NAMES, QK_NORM_GGUF, QK_NORM_HF, Family

FAMILY = Family(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    gguf_arch="qwen3",
    hf_names=HF_NAMES | QK_NORM_HF,
    gguf_names=GGUF_NAMES | QK_NORM_GGUF,
    qk_norms=True,
    optional_biases={"attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj")},
    gguf_biases=("q_proj", "k_proj", "v_proj"),
    sliding_window="use_sliding_window",
    default_head_dim=128,
)
