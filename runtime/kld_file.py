"""llama-perplexity's files of log-probabilities (`--kl-divergence-base`), read and written.

Layout, little-endian, as in llama.cpp's tools/perplexity/perplexity.cpp:

    8 bytes   "_logits_"
    int32     n_ctx, n_vocab, n_chunk
    int32     tokens [n_chunk, n_ctx]: the text cut into consecutive chunks, what is left over dropped
    rows      [n_chunk, n_ctx - 1 - n_ctx // 2], one per scored position, each
                  float32 scale, float32 low, uint16 codes [n_vocab, rounded up to an even number]
              log p = low + scale · code

Scored are the positions n_ctx // 2 to n_ctx - 2 of every chunk. The tokens are those of the whole text, whose first is
BOS if the model adds one; when a chunk is run, BOS takes the place of its first token, which the file keeps.

16 bits span at most 16 nats below the most likely token, so a log-probability is off by up to 16 / 65535 / 2 =
1.2e-4 nats, and everything less likely is stored as if it lay at that edge. The KL divergence is therefore summed, as
llama-perplexity sums it, over tokens with log p > -16 only.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime.metrics import CHUNK, log_softmax
from optrot_edge.runtime.reference import Comparison, check_finite, whole_file

MAGIC = b"_logits_"
SUFFIX = ".kld"
DEFAULT_CONTEXT = 512  # llama-perplexity's own
_HEADER = struct.Struct("<8s3i")
_SPAN = np.float32(16)  # nats below the most likely token that the codes reach
_TOP = np.float32(65535)
_FLOOR = -16.0  # less likely tokens do not count


@dataclass
class KldFile:
    """A file of log-probabilities; its rows stay on the disk.

    tokens int32 [chunks, n_ctx]; rows: structured [chunks, positions], see the module docstring; nll float32 [chunks,
    positions], nats; first: the first scored position.
    """

    path: Path
    tokens: np.ndarray
    rows: np.ndarray
    nll: np.ndarray
    vocab_size: int
    truncated = False
    text_sha256 = None  # the file does not name its text either
    runtime = "not said by the file"

    @property
    def model(self) -> str:
        """The file does not name its model."""
        return f"the model behind {self.path.name}"

    @property
    def first(self) -> int:
        """The first scored position of a window."""
        return self.tokens.shape[1] // 2

    def adopt(self, tokenizer, text: str | None) -> None:
        """Put BOS at the start of every chunk, as llama-perplexity does, if the package's `tokenizer` adds it.

        text: what the file was made from, if it is known. Raises InputError when the file's tokens are not the
        tokenizer's.
        """
        begins = int(self.tokens[0, 0])
        if tokenizer.adds_bos != (begins == tokenizer.bos):
            adds, has = ("adds", "does not begin") if tokenizer.adds_bos else ("does not add", "begins")
            raise InputError(f"the package's tokenizer {adds} BOS (id {tokenizer.bos}), but {self.path.name} {has} "
                             "with it; it was made with another tokenizer")
        if text is not None:
            theirs = self.tokens.reshape(-1).tolist()
            ours = text_tokens(tokenizer, text)[:len(theirs)]
            if ours != theirs:
                same = (a == b for a, b in zip(ours, theirs, strict=False))
                at = next((i for i, equal in enumerate(same) if not equal), len(ours))
                raise InputError(f"{self.path.name} was made from another text or with another tokenizer: it differs "
                                 f"from token {at} on; leave --text out if only the text is another")
        if tokenizer.adds_bos:
            self.tokens[:, 0] = tokenizer.bos

    def compare(self, window: int, logits: np.ndarray) -> Comparison:
        """The scored positions of chunk number `window` against the package's finite logits [positions + 1, vocab].

        Raises InputError when the file's numbers are no probabilities.
        """
        n = self.rows.shape[1]
        kl, agree = np.empty((2, n))
        for i in range(0, n, CHUNK):
            part = slice(i, min(i + CHUNK, n))
            logp, logq = self.log_probs(window, part), log_softmax(logits[part])
            p = np.exp(logp)
            mass = p.sum(-1)
            if not ((mass > 0.999) & (mass < 1.001 + self.vocab_size * np.exp(_FLOOR))).all():
                raise InputError(f"{self.path}: damaged: the probabilities of chunk {window} do not sum to one; write "
                                 "it again")
            kl[part] = np.where(logp > _FLOOR, p * (logp - logq), 0).sum(-1)
            agree[part] = logq.argmax(-1) == logp.argmax(-1)
        return Comparison(kl, np.zeros(n), kl, agree)

    def log_probs(self, window: int, part: slice) -> np.ndarray:
        """Log-probabilities float64 [positions, vocab] of the scored positions `part` of a chunk."""
        rows = self.rows[window, part]
        codes = rows["codes"][:, :self.vocab_size].astype(np.float64)
        return rows["low"].astype(np.float64)[:, None] + rows["scale"].astype(np.float64)[:, None] * codes


def is_kld(path: str | Path) -> bool:
    """Whether a file is, or by its name should be, one of llama-perplexity's."""
    path = Path(path)
    with path.open("rb") as handle:
        return handle.read(len(MAGIC)) == MAGIC or path.suffix == SUFFIX


def text_tokens(tokenizer, text: str) -> list[int]:
    """Token ids of `text` as llama-perplexity reads it from `-f`: less one newline at its end, after BOS if the model
    adds one."""
    ids = tokenizer.tokenize(text.removesuffix("\n"))
    return [tokenizer.bos, *ids] if tokenizer.adds_bos else ids


def cut_chunks(ids: list[int], n_ctx: int | None, chunks: int | None, most: int) -> np.ndarray:
    """The first chunks int32 [chunks, n_ctx] of `ids`, by default of 512 tokens and as many as there are, at most
    `most`. Raises InputError when the text is too short."""
    n_ctx = DEFAULT_CONTEXT if n_ctx is None else n_ctx
    if n_ctx < 3:
        raise InputError(f"chunks of {n_ctx} tokens leave nothing to score; use at least 3")
    if chunks is not None and chunks < 1:
        raise InputError(f"{chunks} chunks asked for; at least 1 is needed")
    available = len(ids) // n_ctx
    if available < (chunks or 1):
        raise InputError(f"the text gives {len(ids)} tokens, which is {available} chunks of {n_ctx}, but {chunks or 1} "
                         "are needed; use a longer text, or fewer or shorter chunks (--windows, --window)")
    count = chunks or min(available, most)
    return np.array(ids[:count * n_ctx], np.int32).reshape(count, n_ctx)


def write_kld(path: str | Path, backend, tokens: np.ndarray, *, bos: int | None, progress=None) -> KldFile:
    """Score chunks `tokens` [b, n_ctx] with `backend` and write them as llama-perplexity would.

    bos: takes the place of every chunk's first token when it is run, None if the model adds none. The file takes about
    2 · vocab bytes per scored position. Raises InputError for non-finite logits, or when `path` cannot be written.
    """
    path, first = Path(path), tokens.shape[1] // 2
    run = tokens.copy()
    if bos is not None:
        run[:, 0] = bos
    with whole_file(path) as handle:
        handle.write(_HEADER.pack(MAGIC, tokens.shape[1], backend.vocab_size, len(tokens)))
        handle.write(tokens.astype("<i4").tobytes())
        for index, logits in enumerate(backend.iter_logits(run, progress=progress)):
            check_finite(logits, index, backend.name)
            for start in range(first, tokens.shape[1] - 1, CHUNK):
                handle.write(compress(logits[start:min(start + CHUNK, tokens.shape[1] - 1)]).tobytes())
            if progress:
                progress(index + 1, len(tokens), "chunks")
    return read_kld(path)


def row_type(vocab_size: int) -> np.dtype:
    """Layout of one scored position."""
    return np.dtype([("scale", "<f4"), ("low", "<f4"), ("codes", "<u2", (vocab_size + vocab_size % 2,))])


def compress(logits: np.ndarray) -> np.ndarray:
    """Rows (`row_type`) of finite logits [positions, vocab], in llama-perplexity's float32 arithmetic."""
    logits = logits.astype(np.float32)
    top = logits.max(-1, keepdims=True)
    low = np.maximum(logits.min(-1, keepdims=True), top - _SPAN)
    scale = (top - low) / _TOP
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    total = np.log(np.exp(logits - top).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    rows = np.zeros(len(logits), row_type(logits.shape[1]))
    rows["scale"], rows["low"] = scale[:, 0], (low - top - total)[:, 0]
    steps = np.rint(inverse * np.maximum(logits - low, 0))
    rows["codes"][:, :logits.shape[1]] = np.minimum(steps, _TOP).astype(np.uint16)
    return rows


def read_kld(path: str | Path) -> KldFile:
    """Open and check a file of log-probabilities. Raises InputError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            header = handle.read(_HEADER.size)
            if len(header) < _HEADER.size or not header.startswith(MAGIC):
                raise InputError(f"{path}: not a file of log-probabilities; make one with `llama-perplexity "
                                 "--kl-divergence-base` or `optrot-edge reference`")
            n_ctx, vocab, chunks = _HEADER.unpack(header)[1:]
            if n_ctx < 3 or vocab < 1 or chunks < 1:
                raise InputError(f"{path}: damaged: {chunks} chunks of {n_ctx} tokens, a vocabulary of {vocab}")
            kind, count = row_type(vocab), n_ctx - 1 - n_ctx // 2
            offset = _HEADER.size + 4 * chunks * n_ctx
            _check_size(path, size, offset, chunks, count * kind.itemsize)
            tokens = np.frombuffer(handle.read(offset - _HEADER.size), "<i4").reshape(chunks, n_ctx).copy()
        rows = np.memmap(path, kind, "r", offset, (chunks, count))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    if not 0 <= tokens.min() <= tokens.max() < vocab:
        raise InputError(f"{path}: damaged: token ids outside the vocabulary of {vocab}; write it again")
    return KldFile(path, tokens, rows, _target_nll(path, rows, tokens), vocab)


def _check_size(path: Path, size: int, offset: int, chunks: int, chunk_bytes: int) -> None:
    expected = offset + chunks * chunk_bytes
    if size < expected:
        whole = max(0, size - offset) // chunk_bytes
        raise InputError(f"{path}: cut off: {size:,} bytes of {expected:,}, {whole} of {chunks} chunks; write it again")
    if size > expected:
        raise InputError(f"{path}: damaged: {size - expected:,} bytes too long; write it again")


def _target_nll(path: Path, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """NLL float32 [chunks, positions] of each scored position's next token; InputError for impossible scales."""
    targets, nll = tokens[:, -rows.shape[1]:], np.empty(rows.shape, np.float32)
    for chunk, part in enumerate(rows):
        scale, low = part["scale"], part["low"]
        with np.errstate(invalid="ignore", over="ignore"):
            sound = np.isfinite(low) & (scale >= 0) & (low + scale * _TOP <= 1e-3)
        if not sound.all():
            raise InputError(f"{path}: damaged: impossible scales in chunk {chunk}; write it again")
        nll[chunk] = -(low + scale * part["codes"][np.arange(len(part)), targets[chunk]])
    return np.maximum(nll, 0)
