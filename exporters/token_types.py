"""Token texts, GGUF token types and scores of Hugging Face's vocabularies, by id and padded."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from gguf import TokenType

from optrot_edge.errors import InputError
from optrot_edge.exporters.pre_tokenizers import SPACE
from optrot_edge.exporters.sentencepiece_model import SentencePieceModel

ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # llama.cpp's converter's
_ALWAYS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def tokens_and_types(definition: dict, vocab_size: int, *, sentencepiece: bool) -> tuple[list[str], list[TokenType]]:
    """Texts and types of the tokens of a tokenizer.json, padded up to `vocab_size`.

    Raises InputError for what llama.cpp cannot have or does otherwise, KeyError and the like for a damaged file.
    """
    vocab = definition["model"]["vocab"]
    texts = {token_id: text for text, token_id in vocab.items()}
    if len(texts) != len(vocab):
        raise InputError("two tokens have the same id; restore the file or pass --vocab-from FILE.gguf")
    types = dict.fromkeys(texts, TokenType.NORMAL)
    if sentencepiece:
        for token_id, text in texts.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", text):
                types[token_id] = TokenType.BYTE
        if sum(kind is TokenType.BYTE for kind in types.values()) != 256:
            raise InputError("a byte-fallback vocabulary without all 256 byte tokens; "
                             "pass --vocab-from FILE.gguf")
    for token_id, token in _added_tokens(definition):
        texts[token_id], types[token_id] = token["content"], _added_type(token)
    unknown = definition["model"].get("unk_token")
    if sentencepiece and unknown in vocab:
        types[vocab[unknown]] = TokenType.UNKNOWN
    if texts and not 0 <= min(texts) <= max(texts) < vocab_size:
        raise InputError(f"token id {max(texts)} does not fit the model's {vocab_size} embedding rows; "
                         "the tokenizer belongs to another model")
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    _check_twice(tokens)
    return tokens, [types.get(i, TokenType.UNUSED) for i in range(vocab_size)]


def _added_tokens(definition: dict) -> Iterator[tuple[int, dict]]:
    """The added tokens of a tokenizer.json with their ids.

    The tokenizers library does not take ids from the file: a token that the vocabulary has keeps its id there, others
    are counted on. Raises InputError where that is not what the file says.
    """
    vocab, size, ids = definition["model"]["vocab"], len(definition["model"]["vocab"]), {}
    for token in definition.get("added_tokens") or []:
        _check_strips(token)
        text, highest = token["content"], max(ids.values(), default=-1)
        token_id = vocab.get(text, ids.get(text, max(highest + 1, size)))
        if token_id != token["id"]:
            raise InputError(f"added token {text!r} has the id {token['id']}, but the tokenizers library gives it "
                             f"{token_id}; restore the file or pass --vocab-from FILE.gguf")
        ids[text] = token_id
        yield token_id, token


def sentencepiece_tokens(model: SentencePieceModel, vocab_size: int, added: dict[str, int],
                         decoder: dict[str, dict]) -> tuple[list[str], list[TokenType], list[float]]:
    """Texts, types and scores of the tokens of a tokenizer.model, padded up to `vocab_size`.

    `added` is added_tokens.json, `decoder` tokenizer_config.json's added_tokens_decoder, which goes before. Raises as
    `tokens_and_types` does.
    """
    missing = range(len(model.texts), vocab_size)
    if len(model.texts) > vocab_size:
        raise InputError(f"{len(model.texts)} tokens do not fit the model's {vocab_size} embedding rows; the tokenizer "
                         "belongs to another model")
    for text, kind in zip(model.texts, model.types, strict=True):
        if kind == TokenType.USER_DEFINED and SPACE in text:
            raise InputError(f"the user-defined piece {text!r} holds a space, and llama.cpp looks for such pieces "
                             "before it puts a space before the text; pass --vocab-from FILE.gguf")
    tokens = model.texts + [f"[PAD{i}]" for i in missing]
    types = model.types + [TokenType.UNUSED] * len(missing)
    scores = model.scores + [PADDING_SCORE] * len(missing)
    more = [{"content": text, "id": token_id} for text, token_id in added.items()]
    for token in more + [token | {"id": int(token_id)} for token_id, token in decoder.items()]:
        _check_strips(token)
        token_id, text = token["id"], token["content"]
        if not 0 <= token_id < vocab_size:
            raise InputError(f"added token {text!r} has id {token_id}, which does not fit the model's {vocab_size} "
                             "embedding rows")
        if types[token_id] not in (TokenType.UNKNOWN, TokenType.BYTE):
            types[token_id] = _added_type(token)
        tokens[token_id], scores[token_id] = text, ADDED_SCORE
    _check_twice(tokens)
    return tokens, types, scores


def _added_type(token: dict) -> TokenType:
    special = token.get("special") or looks_special(token["content"])
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _check_strips(token: dict) -> None:
    if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
        raise InputError(f"added token {token['content']!r} strips its surroundings, which llama.cpp does not do; pass "
                         "--vocab-from FILE.gguf if a published vocabulary is to be used")


def _check_twice(tokens: list[str]) -> None:
    if len(set(tokens)) != len(tokens):
        repeated = next(text for text, count in Counter(tokens).items() if count > 1)
        raise InputError(f"token {repeated!r} occurs twice, which llama.cpp cannot load; restore the file or pass "
                         "--vocab-from FILE.gguf")


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter makes a control token of an added token with this text in any case."""
    return text in _ALWAYS_SPECIAL or bool(re.fullmatch(r"<\|.*\|>|<｜.*｜>|<unused.*>", text, re.DOTALL))
