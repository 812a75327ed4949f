"""Tiny models with tokenizers, and the cheap recipe, that the tests of the whole road share."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

from tests.tiny_models import save_tiny

FAST = {"optrot_steps": 3, "optrot_rows": 64, "nsamples": 4, "seqlen": 32}
FAST_OPTIONS = [part for key, value in FAST.items() for part in (f"--{key.replace('_', '-')}", str(value))]
_TOKENIZERS = {"qwen2": "qwen2", "qwen2_untied": "qwen2", "qwen3": "qwen2", "qwen3_tied": "qwen2",
               "llama3_rope": "llama-bpe", "llama": "gpt-2"}


def save_model(path: Path, case: str, **options) -> Path:
    """The tiny model of `case` with a tokenizer as its family has one (Llama 3's adds BOS)."""
    return save_tiny(path, case, tokenizer=_TOKENIZERS.get(case, "smollm"), **options)


def write_text(path: Path, topics: int = 3) -> Path:
    """A text file of some thousand tokens."""
    names = sorted(pydoc_data.topics.topics)[:topics]
    path.write_text("\n".join(pydoc_data.topics.topics[name] for name in names))
    return path
