"""Mistral 7B and its kin: Llama's wiring with an optional sliding window in every layer.

llama.cpp knows it as `llama`, which attends to the whole context: beyond the window the two differ.
"""

from optrot_edge.models.family import Family

FAMILY = Family(
    model_type="mistral",
    hf_class="MistralForCausalLM",
    gguf_arch="llama",
    gguf_permutes_qk=True,
    gguf_biases=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    sliding_window="sliding_window",
)
