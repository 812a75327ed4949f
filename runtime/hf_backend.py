"""What backends of folders with a Hugging Face tokenizer share: tokens, and windows of logits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime.text import HfTokenizer, check_ids


class HfBackend:
    """A backend needs `path`, `vocab_size`, `n_ctx`, `context_length` and `logits(tokens)`."""

    path: Path
    vocab_size: int
    n_ctx: int
    context_length: int

    @functools.cached_property
    def _tokenizer(self) -> HfTokenizer:
        return HfTokenizer(self.path)

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer puts a beginning-of-sequence token before a text."""
        return self._tokenizer.adds_bos

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, None if the tokenizer has none."""
        return self._tokenizer.bos

    def tokenize(self, text: str, *, add_bos: bool | None = None, special: bool = False) -> list[int]:
        """Ids of `text`. add_bos None: as the tokenizer wants; special: read `<|…|>` marks as control tokens."""
        add_bos = self.adds_bos if add_bos is None else add_bos
        if add_bos and self.bos is None:
            raise InputError(f"{self.path}: the tokenizer has no beginning-of-sequence token to add")
        return ([self.bos] if add_bos else []) + self._tokenizer.tokenize(text, special=special)

    def detokenize(self, tokens, *, special: bool = True) -> str:
        """Text of token ids; special False leaves control tokens out."""
        return self._tokenizer.detokenize(self._check_ids(tokens).tolist(), special=special)

    def _check_ids(self, tokens) -> np.ndarray:
        return check_ids(tokens, self.vocab_size, self.path.name)

    def _check_length(self, length: int) -> None:
        limit = min(self.n_ctx, self.context_length)
        if length > limit:
            raise InputError(f"{length} tokens do not fit the context of {limit} tokens of {self.path.name}; "
                             "use a shorter window or prompt")

    def iter_logits(self, tokens: np.ndarray, *, progress=None) -> Iterator[np.ndarray]:
        """Logits [n, vocab] of each window of `tokens` [b, n], one at a time."""
        for window in tokens:
            yield self.logits(window)

    def logits_batch(self, tokens: np.ndarray) -> np.ndarray:
        """Logits float32 [b, n, vocab] of windows [b, n]; `iter_logits` needs b times less memory."""
        return np.stack(list(self.iter_logits(np.asarray(tokens))))
