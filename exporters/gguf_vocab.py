"""Vocabulary → `tokenizer.*` keys of a GGUF, from a GGUF verbatim or from Hugging Face files.

A Hugging Face tokenizer is recognised by its *definition* in tokenizer.json (normaliser,
pre-tokenizer, `ignore_merges`), looked up in `PRE_TOKENIZERS`; anything else is refused, because
llama.cpp splits text by a name alone and a wrong name is wrong silently.

Where llama.cpp cannot follow Hugging Face: it applies no NFC (Qwen2 on decomposed text), and in
SentencePiece vocabularies it puts a space before the text after *every* special token, and before
text that already begins with one, as SentencePiece itself does.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
from gguf import GGUFValueType, TokenType

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import Entries, array, boolean, read_entries, string, u32
from optrot_edge.exporters.pre_tokenizers import identify

_UNMERGEABLE = -1e6  # score of tokens that no merge may form; the merges' scores are -1, -2, ...


def vocabulary(folder: Path, vocab_size: int, *, vocab_from: Path | None = None,
               special_ids: dict[str, int] | None = None) -> Entries:
    """The `tokenizer.*` keys of a model with `vocab_size` embedding rows.

    `folder` holds `vocab.gguf` or tokenizer.json with its companions; `vocab_from`, any GGUF of the
    same vocabulary, is preferred to both. `special_ids` ("bos", "eos", ...) fill in what the
    tokenizer's own files leave open. Raises InputError when there is no vocabulary, when its size
    is not the model's, and for a tokenizer that llama.cpp has no name for.
    """
    source = vocab_from or folder / "vocab.gguf"
    if vocab_from or source.is_file():
        return _from_gguf(source, vocab_size)
    if (folder / "tokenizer.json").is_file():
        return _from_hugging_face(folder, vocab_size, special_ids or {})
    raise InputError(f"{folder}: neither vocab.gguf nor tokenizer.json; pass --vocab-from FILE.gguf "
                     "to copy the vocabulary of another GGUF of this model")


def _from_gguf(path: Path, vocab_size: int) -> Entries:
    entries = {key: value for key, value in read_entries(path).items() if key.startswith("tokenizer.")}
    tokens = entries.get("tokenizer.ggml.tokens")
    if tokens is None or "tokenizer.ggml.model" not in entries:
        raise InputError(f"{path}: holds no vocabulary; pass --vocab-from with a GGUF that has one")
    if len(tokens.value) != vocab_size:
        raise InputError(f"{path}: {len(tokens.value)} tokens, but the model has {vocab_size} "
                         "embedding rows; pass --vocab-from with a GGUF of this very model")
    return entries


def _from_hugging_face(folder: Path, vocab_size: int, special_ids: dict[str, int]) -> Entries:
    path = folder / "tokenizer.json"
    try:
        definition = json.loads(path.read_text(encoding="utf-8"))
        special = gguf.SpecialVocab(folder, n_vocab=vocab_size)
        kind, pre, space_prefix = identify(definition)
        tokens, types = _tokens(definition, vocab_size, sentencepiece=kind == "llama")
        merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m)
                  for m in definition["model"]["merges"]]
        entries: Entries = {"tokenizer.ggml.model": string(kind), "tokenizer.ggml.pre": string(pre),
                            "tokenizer.ggml.tokens": array(tokens, GGUFValueType.STRING),
                            "tokenizer.ggml.token_type": array(types, GGUFValueType.INT32)}
        if kind == "llama":
            scores = sentencepiece_scores(tokens, types, merges)
            entries["tokenizer.ggml.scores"] = array(scores, GGUFValueType.FLOAT32)
            entries["tokenizer.ggml.add_space_prefix"] = boolean(space_prefix)
        else:
            joined = [f"{left} {right}" for left, right in merges]
            entries["tokenizer.ggml.merges"] = array(joined, GGUFValueType.STRING)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        raise InputError(f"{path}: damaged or incomplete ({error!r}); restore it or pass "
                         "--vocab-from FILE.gguf") from None
    return entries | _special_entries(path, special, special_ids)


def _tokens(definition: dict, vocab_size: int, *, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Token texts and GGUF token types, padded up to `vocab_size`."""
    model, added = definition["model"], definition.get("added_tokens") or []
    texts = {token_id: text for text, token_id in model["vocab"].items()}
    types = dict.fromkeys(texts, TokenType.NORMAL)
    if sentencepiece:
        for token_id, text in texts.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", text):
                types[token_id] = TokenType.BYTE
        if sum(kind is TokenType.BYTE for kind in types.values()) != 256:
            raise InputError("a byte-fallback vocabulary without all 256 byte tokens; "
                             "pass --vocab-from FILE.gguf")
    for token in added:
        token_id, text = token["id"], token["content"]
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise InputError(f"added token {text!r} strips its surroundings, which llama.cpp does not "
                             "do; pass --vocab-from FILE.gguf if a published vocabulary is to be used")
        # llama.cpp itself turns <|...|> tokens into control tokens when it knows them.
        control = token.get("special") or re.fullmatch(r"<\|.*\|>|<｜.*｜>", text, re.DOTALL)
        texts[token_id] = text
        types[token_id] = TokenType.CONTROL if control else TokenType.USER_DEFINED
    unknown = model.get("unk_token")
    if sentencepiece and unknown in model["vocab"]:
        types[model["vocab"][unknown]] = TokenType.UNKNOWN
    if texts and not 0 <= min(texts) <= max(texts) < vocab_size:
        raise InputError(f"token id {max(texts)} does not fit the model's {vocab_size} embedding rows; "
                         "the tokenizer belongs to another model")
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    if len(set(tokens)) != vocab_size:
        repeated = next(text for text in set(tokens) if tokens.count(text) > 1)
        raise InputError(f"token {repeated!r} occurs twice, which llama.cpp cannot load")
    return tokens, [int(types.get(i, TokenType.UNUSED)) for i in range(vocab_size)]


def sentencepiece_scores(tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Scores under which llama.cpp's SentencePiece merging does what the ranked `merges` do.

    llama.cpp joins any two neighbours whose text is a token, best score first; a merge list joins
    listed pairs, lowest rank first. They agree when every split of a token into two tokens is
    listed and the pairs of one token have neighbouring ranks, as in lists made from a
    SentencePiece model. Raises InputError when they do not.
    """
    order: dict[str, int] = {}
    previous = None
    for left, right in merges:
        if (text := left + right) != previous:
            if text in order:
                raise InputError(f"the merges of token {text!r} are not neighbours; pass "
                                 "--vocab-from FILE.gguf")
            order[text], previous = len(order), text
    listed = set(merges)
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    for text in normal:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            known = (len(left) == 1 or left in normal) and (len(right) == 1 or right in normal)
            if known and (left, right) not in listed:
                raise InputError(f"no merge {left!r} + {right!r} although {text!r} is a token, so "
                                 "llama.cpp would split text otherwise; pass --vocab-from FILE.gguf")
    return [-1.0 - order[text] if text in order and text in normal
            else 0.0 if len(text) == 1 or kind == TokenType.BYTE else _UNMERGEABLE
            for text, kind in zip(tokens, types, strict=True)]


def _special_entries(path: Path, special: gguf.SpecialVocab, fallback: dict[str, int]) -> Entries:
    """Special token ids, which of them are added to a prompt, and the chat templates."""
    ids = {name: value for name, value in fallback.items() if value is not None} | special.special_token_ids
    if "eos" not in ids:  # llama.cpp would stop at token 11
        raise InputError(f"{path}: no end-of-sequence token named in tokenizer_config.json; add "
                         "eos_token or pass --vocab-from FILE.gguf")
    entries: Entries = {}
    for name, key in {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown",
                      "sep": "seperator", "pad": "padding", "mask": "mask"}.items():
        if name in ids:
            entries[f"tokenizer.ggml.{key}_token_id"] = u32(ids[name])
    for name in ("bos", "eos"):
        added = bool(special.add_special_token.get(name))
        if added and name not in ids:
            raise InputError(f"{path}: a {name} token is to be added, but none is named in "
                             "tokenizer_config.json")
        entries[f"tokenizer.ggml.add_{name}_token"] = boolean(added)
    templates = special.chat_template or []
    if isinstance(templates, str):
        templates = [{"name": "default", "template": templates}]
    others = [t["name"] for t in templates if t["name"] != "default"]
    for template in templates:
        suffix = "" if template["name"] == "default" else f".{template['name']}"
        entries[f"tokenizer.chat_template{suffix}"] = string(template["template"])
    if others:
        entries["tokenizer.chat_templates"] = array(others, GGUFValueType.STRING)
    return entries
