"""tokenizer.model, SentencePiece's own file: its pieces, scores and settings, read without the package sentencepiece.

The file is a protocol buffer (sentencepiece_model.proto): pieces in field 1, the trainer's settings in field 2, the
normaliser's in field 3. Only what llama.cpp's "llama" vocabulary does is accepted.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType

from optrot_edge.errors import InputError

_TYPES = {1: TokenType.NORMAL, 2: TokenType.UNKNOWN, 3: TokenType.CONTROL, 4: TokenType.USER_DEFINED,
          5: TokenType.UNUSED, 6: TokenType.BYTE}
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieceModel:
    """Pieces by id: texts (a space is "▁"), scores and types; whether a space is put before a text; the ids of "unk",
    "bos", "eos" and "pad" that there are, one each."""

    texts: list[str]
    scores: list[float]
    types: list[TokenType]
    space_prefix: bool
    ids: dict[str, list[int]]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The model in the file at `path`.

    Raises InputError if it is damaged, no BPE with byte fallback, or changes a text before cutting it, which llama.cpp
    does not do.
    """
    try:
        pieces, trainer, normaliser = [], {}, {}
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                pieces.append(dict(_fields(value)))
            elif field == 2:
                trainer = dict(_fields(value))
            elif field == 3:
                normaliser = dict(_fields(value))
        texts = [piece[1].decode() for piece in pieces]
        scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
        types = [_TYPES[piece.get(3, 1)] for piece in pieces]
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, struct.error, OSError) as error:
        raise InputError(f"damaged or no SentencePiece model ({error!r}); restore it or pass --vocab-from "
                         "FILE.gguf") from None
    _check(types, trainer, normaliser)
    ids = {name: trainer.get(field, default) for name, field, default in
           (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))}
    return SentencePieceModel(texts, scores, types, bool(normaliser.get(3, 1)),
                              {name: [token] for name, token in ids.items() if 0 <= token < len(texts)})


def _check(types: list[TokenType], trainer: dict, normaliser: dict) -> None:
    kind = _MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    faults = [(kind != "BPE", f"is a {kind} model"),
              (types.count(TokenType.BYTE) != 256, "has no byte fallback"),
              (normaliser.get(2), "normalises text"), (normaliser.get(4, 1), "removes extra spaces"),
              (not normaliser.get(5, 1), "does not write spaces as ▁"), (trainer.get(24), "puts spaces after words")]
    if found := [text for fault, text in faults if fault]:
        raise InputError(f"it {' and '.join(found)}, which llama.cpp's SentencePiece vocabulary does not do; pass "
                         "--vocab-from FILE.gguf to copy the vocabulary of a published GGUF of this model")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of one message; -1 for a negative integer. Raises ValueError, IndexError."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == _VARINT:
            value, position = _varint(data, position)
            value = value - (1 << 64) if value >> 63 else value
        else:
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if kind == _BYTES:
                size, position = _varint(data, position)
            if size is None or position + size > len(data):
                raise ValueError(f"a field of kind {kind} at byte {position}")
            value, position = data[position:position + size], position + size
        yield key >> 3, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while data[position] & 128:
        value |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return (value | data[position] << shift) & (1 << 64) - 1, position + 1
