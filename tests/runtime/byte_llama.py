"""Tiny llama GGUFs with random float32 weights and a byte-level vocabulary, written with gguf-py."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, CONTEXT = 64, 4, 2, 96, 2, 512
TEXT = "The quick brown fox jumps over the lazy dog; 12 cafés, naïve Ωmega, 你好 and so on.\n" * 60


def byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def write_tiny(path: str | Path, *, seed: int = 0, noise: float = 0.0, add_bos: bool = True,
               chat: str | None = None, extra_tokens: tuple[str, ...] = (), change=None) -> Path:
    """Write a llama with weights from `seed`, disturbed by `noise` (relative).

    `change(name, array)` returns the array to store instead.
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    _write_metadata(writer, add_bos, chat, extra_tokens)
    rng, disturb = np.random.default_rng(seed), np.random.default_rng(99)
    for name, shape in _shapes(256 + 3 + 2 + len(extra_tokens)).items():
        if len(shape) == 1:
            array = rng.uniform(0.5, 1.5, shape)
        else:
            array = rng.standard_normal(shape) * shape[1] ** -0.5
            array = array + noise * shape[1] ** -0.5 * disturb.standard_normal(shape)
        array = array.astype(np.float32)
        writer.add_tensor(name, change(name, array) if change else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def _shapes(vocab: int) -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd.weight": (vocab, HIDDEN), "output_norm.weight": (HIDDEN,),
              "output.weight": (vocab, HIDDEN)}
    for i in range(LAYERS):
        b = f"blk.{i}."
        shapes |= {b + "attn_norm.weight": (HIDDEN,), b + "attn_q.weight": (HIDDEN, HIDDEN),
                   b + "attn_k.weight": (kv, HIDDEN), b + "attn_v.weight": (kv, HIDDEN),
                   b + "attn_output.weight": (HIDDEN, HIDDEN), b + "ffn_norm.weight": (HIDDEN,),
                   b + "ffn_gate.weight": (FFN, HIDDEN), b + "ffn_up.weight": (FFN, HIDDEN),
                   b + "ffn_down.weight": (HIDDEN, FFN)}
    return shapes


def _write_metadata(w: gguf.GGUFWriter, add_bos: bool, chat: str | None, extra: tuple[str, ...]) -> None:
    specials = ["<|bos|>", "<|eos|>", "<|user|>"]
    tokens = specials + byte_tokens() + ["th", "Ġt", *extra]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    w.add_name("tiny")
    w.add_block_count(LAYERS)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HIDDEN // HEADS)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([control] * len(specials) + [normal] * (len(tokens) - len(specials)))
    w.add_token_merges(["t h", "Ġ t"])
    w.add_bos_token_id(0)
    w.add_eos_token_id(1)
    w.add_add_bos_token(add_bos)
    if chat:
        w.add_chat_template(chat)
