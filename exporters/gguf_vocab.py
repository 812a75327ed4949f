"""Vocabulary → `tokenizer.*` keys of a GGUF: from a GGUF verbatim, from tokenizer.json, or from tokenizer.model."""

from __future__ import annotations

import json
from pathlib import Path

from gguf import GGUFValueType, TokenType

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import Entries, array, boolean, read_entries, string
from optrot_edge.exporters.pre_tokenizers import identify
from optrot_edge.exporters.sentencepiece_model import read_sentencepiece
from optrot_edge.exporters.special_tokens import read_json, special_entries
from optrot_edge.exporters.spm_merges import sentencepiece_scores
from optrot_edge.exporters.token_types import PADDING_SCORE, sentencepiece_tokens, tokens_and_types

_PADDED_PART = 64  # at most this part of a vocabulary may be missing from another GGUF's (Qwen2.5: 1/1188)


def vocabulary(folder: Path, vocab_size: int, *, vocab_from: Path | None = None,
               special_ids: dict[str, list[int]] | None = None) -> Entries:
    """The `tokenizer.*` keys of a model with `vocab_size` embedding rows.

    `folder` holds `vocab.gguf`, tokenizer.json or tokenizer.model, the first with its companions; `vocab_from`, any
    GGUF of the same vocabulary, is preferred to all of them. A GGUF's tokens are padded with unused ones, or lose
    unused ones, where another size of the model has so many rows. `special_ids` ("bos", "eos", "pad"; several ids where
    there are several) fill in what the tokenizer's own files leave open. Raises InputError when there is no
    vocabulary, when its size is not the model's, and for a tokenizer that llama.cpp has no name for.
    """
    source = vocab_from or folder / "vocab.gguf"
    if vocab_from or source.is_file():
        return _from_gguf(source, vocab_size)
    if (folder / "tokenizer.json").is_file():
        return _from_hugging_face(folder, vocab_size, special_ids or {})
    if (folder / "tokenizer.model").is_file():
        return sentencepiece_entries(folder, vocab_size, special_ids)
    raise InputError(f"{folder}: neither vocab.gguf nor tokenizer.json nor tokenizer.model; make tokenizer.json with "
                     "transformers (AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)), or pass --vocab-from "
                     "FILE.gguf to copy the vocabulary of another GGUF of this model")


def _from_gguf(path: Path, vocab_size: int) -> Entries:
    entries = {key: value for key, value in read_entries(path).items() if key.startswith("tokenizer.")}
    if "tokenizer.ggml.tokens" not in entries or "tokenizer.ggml.model" not in entries:
        raise InputError(f"{path}: holds no vocabulary; pass --vocab-from with a GGUF that has one")
    tokens, types, scores = (list(entries[key].value) if key in entries else [] for key in
                             ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores"))
    used = max((i + 1 for i, kind in enumerate(types) if kind != TokenType.UNUSED), default=len(tokens))
    if not used <= vocab_size <= len(tokens) + vocab_size // _PADDED_PART:
        raise InputError(f"{path}: {len(tokens)} tokens, but the model has {vocab_size} "
                         "embedding rows; pass --vocab-from with a GGUF of this very model")
    if len(tokens) == vocab_size:
        return entries  # byte for byte
    # another size of the family: its embedding is padded otherwise
    names = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]
    changed = {"tokens": array((tokens + names)[:vocab_size], GGUFValueType.STRING)}
    if types:
        changed["token_type"] = array((types + [int(TokenType.UNUSED)] * len(names))[:vocab_size], GGUFValueType.INT32)
    if scores:
        changed["scores"] = array((scores + [PADDING_SCORE] * len(names))[:vocab_size], GGUFValueType.FLOAT32)
    return entries | {f"tokenizer.ggml.{key}": value for key, value in changed.items()}


def _from_hugging_face(folder: Path, vocab_size: int, special_ids: dict[str, list[int]]) -> Entries:
    path = folder / "tokenizer.json"
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        kind, pre, space_prefix = identify(definition)
        tokens, types = tokens_and_types(definition, vocab_size, sentencepiece=kind == "llama")
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m)
                  for m in definition["model"]["merges"]]
        if kind == "llama":
            scores = sentencepiece_scores(tokens, types, merges)
            more = _sentencepiece_entries(scores, space_prefix)
        else:
            more = {"tokenizer.ggml.merges": array([f"{left} {right}" for left, right in merges],
                                                   GGUFValueType.STRING)}
        return _token_entries(kind, pre, tokens, types) | more | special_entries(
            folder, tokens, definition.get("post_processor"), fallback=special_ids)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise InputError(f"{path}: damaged or incomplete ({error!r}); restore it or pass "
                         "--vocab-from FILE.gguf") from None


def sentencepiece_entries(folder: Path, vocab_size: int | None = None,
                          special_ids: dict[str, list[int]] | None = None) -> Entries:
    """`vocabulary` of tokenizer.model and the files beside it; `vocab_size` None: as many tokens as there are."""
    path = folder / "tokenizer.model"
    try:
        model, config = read_sentencepiece(path), read_json(folder / "tokenizer_config.json")
        added, decoder = read_json(folder / "added_tokens.json"), config.get("added_tokens_decoder") or {}
        if vocab_size is None:
            vocab_size = max([len(model.texts) - 1, *added.values(), *map(int, decoder)]) + 1
        tokens, types, scores = sentencepiece_tokens(model, vocab_size, added, decoder)
        space_prefix = config.get("add_prefix_space")
        space_prefix = space_prefix if isinstance(space_prefix, bool) else model.space_prefix
        return (_token_entries("llama", "default", tokens, types) | _sentencepiece_entries(scores, space_prefix)
                | special_entries(folder, tokens, None, add_bos=True, fallback=model.ids | (special_ids or {})))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: the files beside it are damaged ({error!r}); restore them or pass "
                         "--vocab-from FILE.gguf") from None


def _token_entries(kind: str, pre: str, tokens: list[str], types: list[int]) -> Entries:
    return {"tokenizer.ggml.model": string(kind), "tokenizer.ggml.pre": string(pre),
            "tokenizer.ggml.tokens": array(tokens, GGUFValueType.STRING),
            "tokenizer.ggml.token_type": array([int(kind) for kind in types], GGUFValueType.INT32)}


def _sentencepiece_entries(scores: list[float], space_prefix: bool) -> Entries:
    return {"tokenizer.ggml.scores": array(scores, GGUFValueType.FLOAT32),
            "tokenizer.ggml.add_space_prefix": boolean(space_prefix)}
