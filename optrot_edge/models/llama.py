"""Llama 2 and 3, SmolLM, SmolLM2, TinyLlama: the plain pre-norm decoder."""

from optrot_edge.models.family import Family

FAMILY = Family(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    gguf_arch="llama",
    gguf_permutes_qk=True,
    optional_biases={
        "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
    },
    gguf_biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
