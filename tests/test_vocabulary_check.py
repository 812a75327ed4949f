"""A vocabulary tried in real llama.cpp before it is packaged."""

from __future__ import annotations

import pytest
from gguf import GGUFValueType

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import array, boolean, string
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.vocabulary_check import check_vocabulary
from tests.exporters.gguf_tokenizers import BYTE_LEVEL, LARGE, join_across_words, make_byte_level, make_sentencepiece
from tests.exporters.hf_folders import edited


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama-2", "first", "never"])
def test_good_vocabularies_pass(kind, tmp_path):
    if kind in BYTE_LEVEL:
        join_across_words(make_byte_level(tmp_path, kind))
        entries = vocabulary(tmp_path, LARGE)
    else:
        entries = vocabulary(make_sentencepiece(tmp_path, kind), 512)
    assert check_vocabulary(entries, tmp_path, borrowed=False) == []


def test_other_ids_are_found(tmp_path):
    join_across_words(make_byte_level(tmp_path, "qwen2"))
    wrong = edited(vocabulary(tmp_path, LARGE), pre=string("llama-bpe"), add_bos_token=boolean(False))
    with pytest.raises(InputError, match="tokenizer.json: llama.cpp gives other ids on .*--vocab-from FILE.gguf"):
        check_vocabulary(wrong, tmp_path, borrowed=False)
    [note] = check_vocabulary(wrong, tmp_path, borrowed=True)
    assert note.startswith("with the vocabulary of --vocab-from llama.cpp gives other ids than tokenizer.json on")


def test_another_models_vocabulary_is_refused(tmp_path):
    entries = vocabulary(make_byte_level(tmp_path, "qwen2"), 512)
    tokens = list(entries["tokenizer.ggml.tokens"].value)
    tokens[70], tokens[80] = tokens[80], tokens[70]
    with pytest.raises(InputError, match="--vocab-from: its token ids are not those of the model's tokenizer.json"):
        check_vocabulary(edited(entries, tokens=array(tokens, GGUFValueType.STRING)), tmp_path, borrowed=True)


def test_unloadable_vocabularies_are_refused(tmp_path):
    entries = edited(vocabulary(make_byte_level(tmp_path, "qwen2"), 512), pre=string("of-tomorrow"))
    with pytest.raises(InputError, match="^--vocab-from: llama.cpp cannot load it: .*unknown pre-tokenizer type"):
        check_vocabulary(entries, tmp_path, borrowed=True)


def test_a_bos_token_that_only_one_side_adds_is_told(tmp_path):
    entries = edited(vocabulary(make_byte_level(tmp_path, "llama-bpe"), 512), add_bos_token=boolean(False))
    assert check_vocabulary(entries, tmp_path, borrowed=True) == [
        "llama.cpp will not put a bos token before a text, tokenizer.json does so"]
