"""Qwen2 and Qwen2.5: q, k and v always have a bias."""

from optrot_edge.models.family import Family

FAMILY = Family(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    gguf_arch="qwen2",
    biases=("q_proj", "k_proj", "v_proj"),
    gguf_biases=("q_proj", "k_proj", "v_proj"),
    sliding_window="use_sliding_window",
)
