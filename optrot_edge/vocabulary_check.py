"""A vocabulary for GGUF tried in llama.cpp itself, against the tokenizer that the model came with."""

from __future__ import annotations

import tempfile
from pathlib import Path

from optrot_edge.errors import InputError
from optrot_edge.journal import sha256

# Words that every way of cutting a text cuts alike: other ids than the model's are another model's.
WORDS = "The quick brown fox jumps over the lazy dog and then goes home"
# Nothing in these is among the differences that docs/gguf.md lists.
TEXTS = (
    "I'm sure they'll say it's what WE'D have done; don't you?", "1 12 123 1234 12345678 3.14159 1,000,000",
    "two  spaces,   three, \t tabs\t\tand\n\n\nlines\r\n  indented, at the end  ", "x\n", "x ",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] / 2; } // done\n\treturn \"%s\\n\";\n",
    "<div class=\"a\">&nbsp;</div> http://example.org/?q=a+b#c snake_case camelCase $x_1 ~/.bashrc ......!!??",
    "我想在苹果工作1314151天～ 日本語のテスト。한국어 텍스트", "Привет, мир! Größe, naïve café",
    "😀👍🏽 👨‍👩‍👧‍👦 🇩🇪 ✅",
)
_checked: dict[tuple, list[str]] = {}  # an export checks before it quantises and again before it writes


def check_vocabulary(entries, folder: Path, *, borrowed: bool) -> list[str]:
    """Load a GGUF's keys `entries` (`gguf_entries.Entries`) in llama.cpp and compare its ids; remarks for the user.

    The ids are compared with those of tokenizer.json in `folder`, if that is there; `borrowed` says that the keys come
    from another GGUF, whose ids may differ on odd texts, which then is a remark. Raises InputError if llama.cpp cannot
    load the vocabulary, or the ids are not the model's.
    """
    from optrot_edge.exporters.gguf_entries import write_entries
    from optrot_edge.runtime.imports import installed

    if not installed("llama_cpp"):
        return ["the vocabulary was not tried in llama.cpp, which is not installed"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "vocabulary.gguf"
        write_entries(path, entries)
        files = path, folder / "tokenizer.json", folder / "tokenizer_config.json"
        key = *(sha256(file) if file.is_file() else None for file in files), borrowed
        if key not in _checked:
            _checked[key] = _check(path, folder, borrowed)
    return list(_checked[key])


def _check(path: Path, folder: Path, borrowed: bool) -> list[str]:
    """`check_vocabulary` for the file `path`."""
    from optrot_edge.runtime.imports import installed
    from optrot_edge.runtime.llama_cpp import LlamaCppBackend
    from optrot_edge.runtime.text import PROBE, HfTokenizer

    try:
        backend = LlamaCppBackend(path, vocab_only=True)
    except InputError as error:
        raise InputError(str(error).replace(str(path), "--vocab-from" if borrowed else str(folder))) from None
    with backend:
        if not (folder / "tokenizer.json").is_file():
            return []
        if not installed("tokenizers"):
            return ["the vocabulary was not compared with tokenizer.json: the package tokenizers is not installed"]
        reference = HfTokenizer(folder)
        differing = [text for text in (WORDS, *TEXTS, PROBE) for special in (False, True)
                     if reference.tokenize(text, special=special) != backend.tokenize(
                         text, add_bos=False, special=special)]
        adds_bos = backend.adds_bos
    if WORDS in differing and borrowed:
        raise InputError("--vocab-from: its token ids are not those of the model's tokenizer.json, not even on plain "
                         "words; pass a GGUF of this very model")
    if differing and not borrowed:
        raise InputError(f"{folder}/tokenizer.json: llama.cpp gives other ids on {differing[0]!r}, so something in it "
                         "has no counterpart in GGUF; pass --vocab-from FILE.gguf to use a published vocabulary")
    notes = []
    if differing:
        notes.append(f"with the vocabulary of --vocab-from llama.cpp gives other ids than tokenizer.json on "
                     f"{differing[0]!r}")
    if adds_bos != reference.adds_bos:
        notes.append(f"llama.cpp will {'' if adds_bos else 'not '}put a bos token before a text, tokenizer.json does "
                     + ("not" if adds_bos else "so"))
    return notes
