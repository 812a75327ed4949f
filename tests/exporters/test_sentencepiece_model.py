"""tokenizer.model without tokenizer.json: ids of the sentencepiece library against real llama.cpp."""

from __future__ import annotations

import io
import json
import pydoc_data.topics

import pytest
from gguf import TokenType
from hypothesis import given, settings

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer
from optrot_edge.exporters.sentencepiece_model import read_sentencepiece
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.text import open_tokenizer
from tests.exporters.gguf_tokenizers import TEXTS
from tests.exporters.hf_folders import check_ids, model_config, rebuild, write_vocab
from tests.exporters.test_pre_tokenizers import TEXT

sentencepiece = pytest.importorskip("sentencepiece")
LLAMA2 = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
          "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True, "split_digits": True}


def train(folder, vocab_size=600, **changes):
    """A tokenizer.model trained on CPython's help topics, as Llama-2's by default."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(list(pydoc_data.topics.topics.values())[:30]), model_writer=out, vocab_size=vocab_size,
        minloglevel=2, **(LLAMA2 | changes))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.fixture(scope="module", params=[True, False])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    library = train(folder, add_dummy_prefix=request.param)
    path = write_vocab(folder / "v.gguf", vocabulary(folder, 608))
    with LlamaCppBackend(path, vocab_only=True) as backend:
        yield library, backend


def test_ids_equal_the_librarys(pair):
    library, backend = pair
    assert backend.adds_bos and backend.bos == library.bos_id()
    for text in TEXTS:
        text = text.replace("\0", "")  # ends a text in the library
        assert backend.tokenize(text, add_bos=False) == library.encode(text), text[:80]


@settings(max_examples=150, deadline=None)
@given(TEXT)
def test_any_text_gives_the_same_ids(pair, text):
    library, backend = pair
    assert backend.tokenize(text, add_bos=False) == library.encode(text)


def test_pieces_and_settings(tmp_path):
    library = train(tmp_path, user_defined_symbols=["[[USER]]"], control_symbols=["<ctl>"], pad_id=3)
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    assert model.texts == [library.id_to_piece(i) for i in range(600)]
    assert model.scores == [library.get_score(i) for i in range(600)]
    kinds = {library.is_unknown: TokenType.UNKNOWN, library.is_control: TokenType.CONTROL,
             library.is_byte: TokenType.BYTE, library.is_unused: TokenType.UNUSED}
    for i, kind in enumerate(model.types):
        wanted = next((kind for test, kind in kinds.items() if test(i)), TokenType.NORMAL)
        assert kind == (TokenType.USER_DEFINED if model.texts[i] == "[[USER]]" else wanted)
    assert model.ids == {"unk": [0], "bos": [1], "eos": [2], "pad": [3]} and model.space_prefix
    keys = vocabulary(tmp_path, 600)
    assert {name: keys[f"tokenizer.ggml.{name}_token_id"].value for name in ("bos", "eos", "unknown", "padding")} == {
        "bos": 1, "eos": 2, "unknown": 0, "padding": 3}


def test_added_tokens_and_settings_of_other_files(tmp_path):
    train(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 600, "[PLAIN]": 601, "<old>": 602}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}, "1": {"content": "<s>", "special": True},
                                 "602": {"content": "<new>", "special": True}},
        "eos_token": "<|im_end|>", "add_bos_token": False, "add_prefix_space": False, "chat_template": "T"}))
    keys = vocabulary(tmp_path, 610)
    tokens, types = (keys[f"tokenizer.ggml.{key}"].value for key in ("tokens", "token_type"))
    assert tokens[599:604][1:] == ["<|im_end|>", "[PLAIN]", "<new>", "[PAD603]"]
    assert types[600:604] == [TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNUSED]
    assert types[:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert keys["tokenizer.ggml.eos_token_id"].value == 600 and keys["tokenizer.chat_template"].value == "T"
    assert not keys["tokenizer.ggml.add_bos_token"].value and not keys["tokenizer.ggml.add_space_prefix"].value
    with pytest.raises(InputError, match="added token '<old>' has id 602, which does not fit the model's 602"):
        vocabulary(tmp_path, 602)


def test_becomes_a_hugging_face_tokenizer(tmp_path):
    train(tmp_path / "model")
    path = write_vocab(tmp_path / "v.gguf", vocabulary(tmp_path / "model", 600))
    check_ids(rebuild(path, tmp_path), path, TEXTS)


def test_tokenises_texts_and_becomes_files_for_other_packages(tmp_path):
    library = train(tmp_path)
    tokenizer = open_tokenizer(tmp_path)
    assert tokenizer.adds_bos and tokenizer.bos == 1
    assert tokenizer.tokenize(TEXTS[0]) == library.encode(TEXTS[0])
    files = write_hf_tokenizer(tmp_path, tmp_path / "out", model_config(608))
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} == {file.name for file in files}
    assert open_tokenizer(tmp_path / "out").tokenize(TEXTS[1]) == library.encode(TEXTS[1])


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "unigram"}, "it is a unigram model, which llama.cpp"),
    ({"byte_fallback": False}, "it has no byte fallback"),
    ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
    ({"remove_extra_whitespaces": True}, "it removes extra spaces"),
    ({"treat_whitespace_as_suffix": True}, "it puts spaces after words"),
    ({"user_defined_symbols": ["▁▁"]}, "the user-defined piece '▁▁' holds a space"),
])
def test_what_llama_cpp_does_not_do_is_refused(changes, message, tmp_path):
    train(tmp_path, **changes)
    with pytest.raises(InputError, match=f"tokenizer.model: {message}.*--vocab-from FILE.gguf"):
        vocabulary(tmp_path, 600)


def test_damaged_files_are_refused(tmp_path):
    train(tmp_path)
    path = tmp_path / "tokenizer.model"
    data = path.read_bytes()
    for damaged in (b"\xff" * 40, data[:1000], b"text, not a model"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="tokenizer.model: .*--vocab-from FILE.gguf"):
            vocabulary(tmp_path, 600)
    path.write_bytes(data)
    with pytest.raises(InputError, match="600 tokens do not fit the model's 599 embedding rows"):
        vocabulary(tmp_path, 599)
