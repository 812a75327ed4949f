"""From a text to windows of token ids, with the tokenizer a package or a model carries."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from optrot_edge.checkpoint import MANIFEST
from optrot_edge.errors import InputError
from optrot_edge.runtime.imports import require

DEFAULT_WINDOW = 256
DEFAULT_WINDOWS = 32
# Stored with a reference file: a tokenizer that splits this otherwise is not the reference's.
PROBE = ("Hello world, it's 3.14159 o'clock on 2024-02-29!\n\n\tdef f(x):\n        return x**2  # café\n"
         "Größe Ελλάδα Привет 你好世界 こんにちは 안녕 مرحبا שלום"
         " 🙂👩\u200d👧 \u00a0\u200b   1234567 WE'RE x_y-z <|im_start|>")


def read_text(path: str | Path) -> str:
    """The UTF-8 text file at `path`. Raises InputError if it is missing, empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8")  # line ends as they are, as llama.cpp's tools read them
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); "
                         "convert it to UTF-8 first") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if not text.strip():
        raise InputError(f"{path}: the text is empty")
    return text


def text_sha256(text: str) -> str:
    """SHA-256 of the text's UTF-8 bytes, in hex. Raises InputError for lone surrogates."""
    try:
        return hashlib.sha256(text.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not valid unicode: {error}") from None


def cut_windows(ids: list[int], window: int | None = None, windows: int | None = None, *,
                bos: int | None = None) -> np.ndarray:
    """Non-overlapping windows int32 [b, window] spread evenly over `ids`.

    Every window begins with `bos` if that is given. windows None: as many as there are, at most 32.
    Raises InputError when the text is too short.
    """
    window = DEFAULT_WINDOW if window is None else window
    prefix = [] if bos is None else [bos]
    body = window - len(prefix)
    if window < 2 or body < 1:
        raise InputError(f"a window of {window} tokens leaves nothing to predict; use at least 2")
    available = len(ids) // body
    if windows is not None and windows < 1:
        raise InputError(f"{windows} windows asked for; at least 1 is needed")
    if available < (windows or 1):
        raise InputError(f"the text gives {len(ids)} tokens, which is {available} windows of {window}, but "
                         f"{windows or 1} are needed; use a longer text, or fewer or shorter windows")
    count = windows or min(available, DEFAULT_WINDOWS)
    starts = np.linspace(0, len(ids) - body, count).astype(int)
    return np.array([prefix + ids[start:start + body] for start in starts], dtype=np.int32)


def check_ids(tokens, vocab_size: int, name: str) -> np.ndarray:
    """One sequence of token ids as int32 [n]; InputError when it is none, or goes beyond the vocabulary of `name`."""
    ids = np.ascontiguousarray(tokens, dtype=np.int64)
    if ids.ndim != 1:
        raise InputError(f"one sequence of token ids is needed, not shape {list(ids.shape)}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise InputError(f"token ids reach from {ids.min()} to {ids.max()}, but {name} knows 0 to {vocab_size - 1}: "
                         "another tokenizer made them")
    return ids.astype(np.int32)


class HfTokenizer:
    """`tokenizer.json` of a Hugging Face folder, or `tokenizer.model` where that is missing."""

    def __init__(self, folder: Path):
        tokenizers = require("tokenizers", "learn", "a Hugging Face tokenizer")
        self._config = _read_config(folder / "tokenizer_config.json")
        if not (folder / "tokenizer.json").is_file():
            from optrot_edge.exporters.hf_vocab import build_tokenizer, read_sentencepiece_vocabulary

            vocabulary = read_sentencepiece_vocabulary(folder)
            self._tokenizer = build_tokenizer(vocabulary)
            self._config = self._config | {"bos_token": vocabulary.special("bos")}
            return
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            if type(error) is not Exception:  # what the library raises for every unusable file
                raise
            raise InputError(f"{folder}/tokenizer.json: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of `text`, without a beginning-of-sequence token. special: read `<|…|>` marks as control tokens.

        Raises InputError for lone surrogates.
        """
        text_sha256(text)
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: list[int], *, special: bool = True) -> str:
        """Text of token ids; special False leaves control tokens out."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        token = self._config.get("bos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return self._tokenizer.token_to_id(token) if isinstance(token, str) else None

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts that token before a text."""
        wanted = self._config.get("add_bos_token")
        if not isinstance(wanted, bool):
            wanted = self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.bos]
        return wanted and self.bos is not None

    def close(self) -> None:
        """Nothing is held open."""


def _read_config(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    return data if isinstance(data, dict) else {}


class GgufTokenizer:
    """The vocabulary of a GGUF, in llama.cpp."""

    def __init__(self, path: Path):
        from optrot_edge.runtime.llama_cpp import LlamaCppBackend

        self._backend = LlamaCppBackend(path, vocab_only=True)
        self.bos, self.adds_bos, self.close = self._backend.bos, self._backend.adds_bos, self._backend.close

    def tokenize(self, text: str) -> list[int]:
        """Ids of `text`, without a beginning-of-sequence token."""
        return self._backend.tokenize(text, add_bos=False)


def open_tokenizer(path: str | Path) -> GgufTokenizer | HfTokenizer:
    """The tokenizer of a GGUF, a quantised checkpoint or a Hugging Face folder. Raises InputError."""
    path = Path(path)
    folder = path / "tokenizer" if (path / MANIFEST).is_file() else path
    if path.is_file():
        return GgufTokenizer(path)
    if (folder / "vocab.gguf").is_file():
        return GgufTokenizer(folder / "vocab.gguf")
    if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file():
        return HfTokenizer(folder)
    raise InputError(f"{folder}: no tokenizer.json, vocab.gguf or tokenizer.model, so the text cannot be tokenised")
