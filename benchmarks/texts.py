"""Text for the benchmarks: where it comes from, and its disjoint parts.

The first 60 % of the characters are for evaluation and the last 30 % for calibration; the gap between
them is not used, so no sentence is in both. Without a file the text is WikiText-2 (raw, test) through
`datasets`, or, where that cannot be had, the help topics that every CPython ships.
"""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optrot_edge.errors import InputError
from optrot_edge.runtime.llama_cpp import LlamaCppBackend


@dataclass(frozen=True)
class BenchmarkText:
    """A text cut in two; `source` and `sha256` say which text it was."""

    evaluation: str
    calibration: str
    source: str
    sha256: str


def load_text(path: str | Path | None = None) -> BenchmarkText:
    """The text of `path`, or the default; InputError when the file cannot be read."""
    if path is None:
        text, source = _default_text()
    else:
        try:
            text, source = Path(path).read_text(encoding="utf-8"), Path(path).name
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text {path}: {error}") from None
    digest = hashlib.sha256(text.encode()).hexdigest()
    return BenchmarkText(text[:len(text) * 6 // 10], text[len(text) * 7 // 10:], source, digest)


def _default_text() -> tuple[str, str]:
    try:
        from datasets import load_dataset

        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        return "".join(rows["text"]), "WikiText-2 raw test"
    except (ImportError, OSError, ValueError) as error:  # not installed, offline, not found
        print(f"WikiText-2 cannot be had ({type(error).__name__}); using the built-in text")
        topics = pydoc_data.topics.topics
        return "\n".join(topics[name] for name in sorted(topics)), "pydoc_data.topics"


def evaluation_windows(backend: LlamaCppBackend, text: str, count: int, length: int) -> np.ndarray:
    """`count` disjoint windows int64 [count, length], spread evenly over `text`; no special tokens."""
    tokens = backend.tokenize(text, add_bos=False)
    available = len(tokens) // length
    if available < count:
        raise InputError(f"the evaluation part has {available} windows of {length} tokens; "
                         f"{count} are needed: give a longer --text or a smaller --windows")
    chosen = np.arange(count) * available // count
    return np.array(tokens[:available * length], dtype=np.int64).reshape(available, length)[chosen]


def calibration_text(backend: LlamaCppBackend, text: str, count: int, length: int) -> str:
    """The beginning of `text` that holds just `count` windows of `length` tokens.

    Both arms read this one string, so both see the same tokens however each of them picks windows.
    """
    tokens = backend.tokenize(text, add_bos=False)
    needed = count * length
    if len(tokens) < needed:
        raise InputError(f"the calibration part has {len(tokens)} tokens; {needed} are needed: "
                         "give a longer --text or smaller --nsamples")
    for margin in range(8, length):  # the end may merge differently once the rest is gone
        part = backend.detokenize(tokens[:needed + margin])
        again = backend.tokenize(part, add_bos=False)
        if again[:needed] == tokens[:needed] and needed <= len(again) < needed + length:
            return part
    raise InputError("the calibration text does not survive a round trip through the tokenizer")
