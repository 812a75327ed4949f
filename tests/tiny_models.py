"""Small random models of every family, saved as Hugging Face folders, and small tokenizers.

`CASES` names the variants. Every linear's input width is a multiple of 32, so that the GGUF block
types apply; hidden sizes are not powers of two in most cases; norm gains and biases are random. `WIDE`, one of each
family, have rows that fill super-blocks of 256.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch

VOCAB_SIZE = 512
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
           "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_BASE = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "rope_parameters": _ROPE, "bos_token_id": 1, "eos_token_id": 2}
_WIDE = {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 1}
_VARIANTS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama3_rope": ("llama", {"hidden_size": 128, "num_attention_heads": 4, "head_dim": 32,
                              "intermediate_size": 224, "rope_parameters": _LLAMA3,
                              "eos_token_id": [2, 3]}),
    "llama_linear_rope": ("llama", {"rope_parameters": {**_ROPE, "rope_type": "linear", "factor": 2.0}}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "smollm2": ("llama", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32,
                          "tie_word_embeddings": True,
                          "rope_parameters": {**_ROPE, "rope_theta": 100000.0}}),
    "tinyllama": ("llama", {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2,
                            "num_hidden_layers": 3, "intermediate_size": 352}),
    "mistral": ("mistral", {"num_attention_heads": 4, "head_dim": 32, "sliding_window": None,
                            "rope_parameters": {**_ROPE, "rope_theta": 1e6}}),
    "mistral_window": ("mistral", {"num_attention_heads": 4, "head_dim": 32, "sliding_window": 8}),
    "qwen2": ("qwen2", {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": None,
                        "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2_untied": ("qwen2", {"hidden_size": 128, "num_attention_heads": 4, "head_dim": None}),
    "qwen3": ("qwen3", {"num_attention_heads": 4, "head_dim": 32, "rms_norm_eps": 1e-6}),
    "qwen3_tied": ("qwen3", {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
                             "head_dim": 32, "tie_word_embeddings": True}),
    "wide": ("llama", _WIDE),
    "wide_mistral": ("mistral", {**_WIDE, "sliding_window": None}),
    "wide_qwen2": ("qwen2", {**_WIDE, "head_dim": None, "tie_word_embeddings": True}),
    "wide_qwen3": ("qwen3", {**_WIDE, "head_dim": 128}),
}
WIDE = [case for case in _VARIANTS if case.startswith("wide")]
CASES = [case for case in _VARIANTS if case not in WIDE]


def tiny_config(case: str, vocab_size: int = VOCAB_SIZE):
    """The transformers config of `case`."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    family, changes = _VARIANTS[case]
    settings = {**_BASE, **changes, "vocab_size": vocab_size}
    settings = {key: value for key, value in settings.items()
                if value is not None or key == "sliding_window"}
    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    return kinds[family](**settings)


def tiny_model(case: str, dtype=torch.float32, vocab_size: int = VOCAB_SIZE, seed: int = 0):
    """A random transformers model of `case`: unit-scale logits, gains in 0.5-1.5, random biases."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config(case, vocab_size), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 2:
                untied_table = "embed_tokens" in name and not model.config.tie_word_embeddings
                scale = 1.0 if untied_table else tensor.shape[1] ** -0.5
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            else:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.to(dtype).eval()


def save_tiny(path: str | Path, case: str, dtype=torch.float32, shards: bool = False,
              vocab_size: int = VOCAB_SIZE, seed: int = 0, tokenizer: str | None = None) -> Path:
    """Save the model of `case` into the folder `path` (several shards if asked); returns it.

    `tokenizer` is a kind for `save_tiny_tokenizer`, or None for no tokenizer.
    """
    path = Path(path)
    model = tiny_model(case, dtype, vocab_size, seed)
    model.save_pretrained(path, max_shard_size="150KB" if shards else "1GB")
    if tokenizer:
        save_tiny_tokenizer(path, tokenizer, vocab_size)
    return path


class _Rotary(torch.nn.Module):
    """Rotary tables in float64 from the frequencies given (transformers always uses float32)."""

    def __init__(self, inv_freq: torch.Tensor):
        super().__init__()
        self.inv_freq = inv_freq

    def forward(self, x, position_ids):
        angles = position_ids[..., None].double() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def reference_model(path: str | Path, dtype=torch.float32, inv_freq=None):
    """transformers' own model of a folder.

    transformers computes RMSNorm and RoPE in float32 whatever the dtype. With `inv_freq` (float64
    [head_dim / 2]) both are replaced by float64-capable modules (torch's own RMSNorm), so that a
    float64 comparison means something; sdpa keeps the softmax in float64, the eager path does not.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()
    if inv_freq is None:
        return model
    model.model.rotary_emb = _Rotary(torch.as_tensor(inv_freq, dtype=torch.float64))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=dtype)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def random_tokens(batch: int = 2, length: int = 24, vocab_size: int = VOCAB_SIZE, seed: int = 0):
    """Token ids [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


_WORDS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
             r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_SPECIALS = {
    "llama-bpe": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eot_id|>"],
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "gpt-2": ["<|endoftext|>"],
}
TOKENIZER_KINDS = list(_SPECIALS)
_CHAT = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
         "+ '<|im_end|>\n' }}{% endfor %}")


def save_tiny_tokenizer(path: str | Path, kind: str = "smollm", vocab_size: int = VOCAB_SIZE) -> Path:
    """Train a byte-level BPE of `kind` on CPython's help topics and save its files into `path`.

    Llama-3 and Qwen2 put their special tokens last, SmolLM and GPT-2 first, as the real ones do.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    specials = _SPECIALS[kind]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind not in _WORDS)
    if kind in _WORDS:
        split = pre_tokenizers.Split(Regex(_WORDS[kind]), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    elif kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    last = kind in _WORDS
    trainer = BpeTrainer(vocab_size=vocab_size - len(specials) * last, show_progress=False,
                         special_tokens=[] if last else specials,
                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(list(pydoc_data.topics.topics.values()), trainer)
    tokenizer.add_special_tokens(specials)
    if kind == "llama-bpe":
        bos = (specials[0], tokenizer.token_to_id(specials[0]))
        tokenizer.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", pair=f"{bos[0]} $A {bos[0]} $B",
                                          special_tokens=[bos])])
    named = {"llama-bpe": {"bos_token": specials[0], "eos_token": specials[-1]},
             "gpt-2": {"bos_token": specials[0], "eos_token": specials[0]},
             "smollm": {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
             "qwen2": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}}[kind]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=_CHAT, **named)
    assert len(fast) == vocab_size
    fast.save_pretrained(path)
    return Path(path)
