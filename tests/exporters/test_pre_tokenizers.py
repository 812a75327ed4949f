"""Random texts cut into words: Hugging Face's tokenizer against real llama.cpp, and the known differences."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_tokenizers import (
    BYTE_LEVEL,
    NORMALISES,
    comparable,
    join_all_bytes,
    make_byte_level,
    make_sentencepiece,
)
from tests.exporters.hf_folders import write_vocab

pytestmark = pytest.mark.slow
# Characters that Unicode has had for long: llama.cpp's tables are of another version than the tokenizers library's.
_OLD = st.characters(exclude_categories=["Cs", "Cn"]).filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn" and c != "\u017f")
_PIECES = st.sampled_from([
    " ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000", "'s", "'LL", "'Re", "'", "a", "B", "Hello",
    "iPhone", "XMLHttp", "1", "23", "4567", "½", "é", "e\u0301", "ह्", "世界", "日本", "안", "ا", "مرحبا", "🙂",
    "👩\u200d👧", "🏽", "\u200b", "_", "/", "//\n", "...", "!?", "=" * 5, "x += 1;", "<|", "|>", "▁", "\x01", "\x7f"])
TEXT = st.lists(_PIECES | _OLD, max_size=12).map("".join)
KINDS = [*BYTE_LEVEL, "llama-2", "never"]


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """The kind, its tokenizer in the tokenizers library, and the exported vocabulary in llama.cpp."""
    kind, folder = request.param, tmp_path_factory.mktemp("pair")
    if kind in BYTE_LEVEL:
        size = join_all_bytes(make_byte_level(folder, kind))
    else:
        make_sentencepiece(folder, kind)
        size = 512
    backend = LlamaCppBackend(write_vocab(folder / "v.gguf", vocabulary(folder, size)), vocab_only=True)
    yield kind, Tokenizer.from_file(str(folder / "tokenizer.json")), backend
    backend.close()


@settings(max_examples=150, deadline=None)
@example("")
@example("  1   22    333")
@given(TEXT)
def test_any_text_gives_the_same_ids(both, text):
    kind, tokenizer, backend = both
    text = comparable(kind, text)
    for special in (False, True):
        tokenizer.encode_special_tokens = not special
        assert tokenizer.encode(text, add_special_tokens=False).ids == backend.tokenize(
            text, add_bos=False, special=special)


DIFFERENCES = [  # text, and the kinds that cut it otherwise in llama.cpp
    ("We'\u017fa", {"llama-bpe", "smaug-bpe", "qwen2", "qwen35", "seed-coder", "minicpm5"}),
    ("e\u0301", {*NORMALISES, "tekken"}),
    ("ب\u064e", {"tekken"}),
    ("aÉ", {"tekken"}),
    ("naïve café Ångström", set()),
    ("École Über", set()),
]


def test_known_differences(both):
    """What docs/gguf.md says llama.cpp does otherwise, it does; and it does nothing else of the kind."""
    kind, tokenizer, backend = both
    tokenizer.encode_special_tokens = True
    for text, kinds in DIFFERENCES:
        same = tokenizer.encode(text, add_special_tokens=False).ids == backend.tokenize(text, add_bos=False)
        assert same == (kind not in kinds), text
