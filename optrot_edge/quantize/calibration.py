"""Calibration text: from a file, a hub dataset, or one that every Python ships."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError


def builtin_text(split: str = "train") -> str:
    """CPython's own documentation topics (`pydoc_data.topics`): about 0.7 MB of English and code.

    Every fourth topic is the "test" split, the rest is "train". Topics quote each other, so the test
    split leaves out every paragraph that the train split has: text measured on was not calibrated on.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    train = "\n\n".join(topics[name] for i, name in enumerate(names) if i % 4)
    if split != "test":
        return train
    seen = {" ".join(part.split()) for part in train.split("\n\n")}
    parts = "\n\n".join(topics[name] for name in names[::4]).split("\n\n")
    return "\n\n".join(part for part in parts if " ".join(part.split()) not in seen)


def load_text(source: str, split: str = "train") -> str:
    """Text of "builtin", of a UTF-8 file, or of a hub dataset "name" or "name:config".

    `split` ("train" or "test") chooses the part of the built-in text or of a dataset.

    Raises InputError when there is none or it is empty.
    """
    if source == "builtin":
        return builtin_text(split)
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_bytes().decode("utf-8")  # line ends as they are, as llama.cpp's tools read them
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {source} as UTF-8 text: {error}") from None
    elif Path(source.partition(":")[0]).suffix or path.is_absolute() or path.exists():
        raise InputError(f"text file {source} not found")
    else:
        text = _hub_text(source, split)
    if not text.strip():
        raise InputError(f"the text {source!r} is empty; give a text file with some paragraphs")
    return text


def _hub_text(source: str, split: str) -> str:
    """The `text` column of a hub dataset, rows joined by blank lines, up to about 20 MB."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError:
        raise InputError('hub datasets need `pip install "optrot-edge[learn]"`; '
                         "or give a text file, or builtin") from None
    name, _, config = source.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True)
        parts, size = [], 0
        for row in rows:
            parts.append(row["text"])
            size += len(row["text"])
            if size > 20_000_000:
                break
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"cannot load dataset {source!r} ({reason}); give a text file, or builtin") from None
    return "\n\n".join(parts)


def sample_windows(ids, nsamples: int, seqlen: int, seed: int, bos: int | None = None, *,
                   more: int = 0, spare: int = 0) -> np.ndarray:
    """`nsamples` windows [nsamples, seqlen] (int64) at seeded random offsets of the token stream.

    `more` windows follow these, drawn after them, and then up to `spare`, as the text has them: each changes
    nothing about those before. Windows do not overlap; with `bos` every window starts with that token. Raises
    InputError when the text is too short.
    """
    ids = np.asarray(ids, dtype=np.int64)
    body = seqlen - (bos is not None)
    slots = len(ids) // body if body > 0 else 0
    if nsamples < 1 or body < 1:
        raise InputError("calibration needs at least one sample of at least two tokens")
    if slots < nsamples + more:
        raise InputError(f"the calibration text has {len(ids)} tokens, enough for {slots} windows of "
                         f"{seqlen}; {nsamples + more} were asked for. Give a longer text, or lower --nsamples")
    rng = np.random.default_rng(seed)
    drawn = np.split(rng.permutation(slots), np.cumsum([nsamples, more, spare]))
    chosen = np.concatenate([np.sort(part) for part in drawn[:3]])
    windows = np.stack([ids[i * body:(i + 1) * body] for i in chosen])
    if bos is not None:
        windows = np.concatenate([np.full((len(windows), 1), bos, dtype=np.int64), windows], axis=1)
    return windows


def text_hash(text: str) -> str:
    """SHA-256 of the UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()
