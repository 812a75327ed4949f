"""The folder as loaders read it: transformers' AutoTokenizer and mlx-lm, beside llama.cpp."""

from __future__ import annotations

import json

import pytest
from gguf import TokenType
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from transformers import AutoTokenizer

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import string, u32
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.exporters.hf_tokenizer import write_hf_tokenizer
from optrot_edge.models.gguf_file import GGUFFile
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_tokenizers import make_byte_level, make_sentencepiece
from tests.exporters.hf_folders import (
    CORPUS,
    adding,
    edited,
    mixtures,
    model_config,
    rebuild,
    retyped,
    sentencepiece_entries,
    smollm2_path,
    with_template,
    write_vocab,
)

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!\n  “Ünï” {{ x }} 👍"},
        {"role": "assistant", "content": " Hello. "}, {"role": "user", "content": "Bye"}]
TEMPLATE = """{%- for message in messages %}
    {{- bos_token if loop.first }}
    {%- if message.role == "user" %}
        [[USER]] {{ message["content"] | trim }}
    {% else %}
<{{ message.role }}>{{ message | tojson }}{{ eos_token }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}<a>{% endif %}"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2's GGUF and the folder made from it."""
    path = smollm2_path()
    return path, rebuild(path, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """`sentencepiece(prefix)`: a GGUF and the folder made from it."""
    made = {}

    def make(prefix: bool):
        if prefix not in made:
            out = tmp_path_factory.mktemp("sentencepiece")
            entries = with_template(sentencepiece_entries(out / "source", prefix=prefix), TEMPLATE)
            path = write_vocab(out / "v.gguf", entries)
            made[prefix] = path, rebuild(path, out)
        return made[prefix]

    return make


def check_loaded(path, folder, specials: list[str], vocab_size: int, cleans: bool = False):
    """Ids, decoding, BOS and chat of AutoTokenizer are llama.cpp's; `cleans` if llama.cpp decodes other spaces."""
    tokenizer, backend = AutoTokenizer.from_pretrained(folder), LlamaCppBackend(path, vocab_only=True)
    try:
        assert len(tokenizer) == vocab_size and tokenizer.model_max_length == 777
        for text in CORPUS + mixtures(specials, 100):
            ids = tokenizer.encode(text)
            assert ids == backend.tokenize(text, special=True), text[:80]
            plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert plain == backend.tokenize(text, add_bos=False), text[:80]
            if "[[USER]]" not in text:  # SentencePiece writes spaces as "▁", and one more after added tokens
                assert tokenizer.decode(plain) == (text.replace("▁", " ") if "[[USER]]" in specials else text)
            if not cleans:
                ids = ids[backend.adds_bos:]
                assert tokenizer.decode(ids) == backend.detokenize(ids)
        formatter = Jinja2ChatFormatter(tokenizer.chat_template, eos_token=tokenizer.eos_token or "",
                                        bos_token=tokenizer.bos_token or "")
        chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
        assert chat == formatter(messages=CHAT).prompt and "Bye" in chat
        ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert ids == backend.tokenize(chat, add_bos=False, special=True)
    finally:
        backend.close()


def test_smollm2_loads(smollm2):
    path, folder = smollm2
    check_loaded(path, folder, ["<|im_start|>", "<|im_end|>", "<file_sep>"], 49152)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.special_tokens_map == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
                                            "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"}
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>")[0] == 1
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_loads(prefix, sentencepiece):
    path, folder = sentencepiece(prefix)
    check_loaded(path, folder, ["<s>", "</s>", "<unk>", "[[USER]]"], 512)
    assert AutoTokenizer.from_pretrained(folder).encode("Hi")[0] == 1


@pytest.mark.parametrize(("kind", "family"), [("llama-bpe", "llama"), ("smaug-bpe", "mistral"), ("gpt-2", "llama"),
                                              ("smollm", "mistral"), ("smollm", "qwen3"), ("qwen2", "qwen3")])
def test_byte_level_loads(kind, family, tmp_path):
    """Whatever tokenizer a config.json of that family would have by itself."""
    source = make_byte_level(tmp_path / "source", kind)
    special = next(iter(json.loads((source / "tokenizer.json").read_text())["added_tokens"]))["content"]
    entries = with_template(vocabulary(source, 512), TEMPLATE)
    path = write_vocab(tmp_path / "v.gguf", entries)
    check_loaded(path, rebuild(path, tmp_path, family), [special], 512, cleans=kind not in ("smollm", "qwen2"))


def test_qwen2_loads_with_its_own_tokenizer(tmp_path):
    """transformers builds it anew for every qwen2: the same ids on composed text, and no token more."""
    entries = vocabulary(make_byte_level(tmp_path / "source", "qwen2"), 512)
    tokens = entries["tokenizer.ggml.tokens"].value
    tokens[tokens.index("<|endoftext|>")] = "<|other|>"  # the former is what transformers would add
    path = write_vocab(tmp_path / "v.gguf", entries)
    tokenizer = AutoTokenizer.from_pretrained(rebuild(path, tmp_path, "qwen2"))
    assert type(tokenizer).__name__ == "Qwen2Tokenizer" and len(tokenizer) == 512
    backend = LlamaCppBackend(path, vocab_only=True)
    for text in CORPUS:
        text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert tokenizer.encode(text) == backend.tokenize(text, special=True)
    backend.close()
    other = write_vocab(tmp_path / "o.gguf", vocabulary(make_byte_level(tmp_path / "other", "smollm"), 512))
    with pytest.raises(InputError, match="qwen2 with a smollm tokenizer.*Hugging Face folder"):
        rebuild(other, tmp_path / "refused", "qwen2")


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_bos_and_eos_reach_transformers(bos, eos, tmp_path):
    entries = vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512)
    path = write_vocab(tmp_path / "v.gguf", adding(entries, bos=bos, eos=eos))
    tokenizer = AutoTokenizer.from_pretrained(rebuild(path, tmp_path))
    ids = tokenizer.encode("Hi")
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (bos, eos)


def test_mlx_lm_loads(smollm2, sentencepiece):
    """The quick detokenizers, and the tokens that end an answer."""
    tokenizer_utils = pytest.importorskip("mlx_lm.tokenizer_utils", reason="needs mlx-lm")
    from mlx_lm.utils import load_config

    kinds = {"BPE": smollm2[1], "SPM": sentencepiece(True)[1], "SPM without prefix": sentencepiece(False)[1]}
    for kind, folder in kinds.items():
        config = load_config(folder)
        tokenizer = tokenizer_utils.load(folder, eos_token_ids=config["eos_token_id"])
        assert tokenizer.eos_token_ids == {2}
        detokenizer = tokenizer.detokenizer
        assert type(detokenizer).__name__ == f"{kind[:3]}StreamingDetokenizer"
        for text in ["Hello, wörld!  Two spaces\n\n\tdef f(x): 你好 👍🏽", *CORPUS]:
            if text.startswith(" ") or "\x00" in text:  # mlx-lm drops the one and misreads the other
                continue
            detokenizer.reset()
            ids = tokenizer.encode(text, add_special_tokens=False)
            for token in ids:
                detokenizer.add_token(token)
            detokenizer.finalize()
            assert detokenizer.text == tokenizer.decode(ids) == text, kind


def test_every_end_is_named(tmp_path):
    entries = vocabulary(make_byte_level(tmp_path / "source", "llama-bpe"), 512)
    entries = edited(entries, eot_token_id=u32(511), eom_token_id=u32(509), eos_token_id=u32(508))
    folder = rebuild(write_vocab(tmp_path / "v.gguf", entries), tmp_path)
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"bos_token_id": 507, "eos_token_id": [508, 511, 509]}


def test_padding_that_is_an_ordinary_token_is_left_out(tmp_path):
    """transformers would cut it out of every text."""
    entries = vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512)
    entries = edited(entries, padding_token_id=u32(entries["tokenizer.ggml.tokens"].value.index("!")))
    folder = rebuild(write_vocab(tmp_path / "v.gguf", entries), tmp_path)
    assert "pad_token_id" not in json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token is None and tokenizer.decode(tokenizer.encode("a!"), skip_special_tokens=True) == "a!"


def test_an_end_that_the_file_calls_user_defined_is_special(tmp_path):
    entries = retyped(vocabulary(make_byte_level(tmp_path / "source", "llama-bpe"), 512), "<|end_header_id|>",
                      TokenType.USER_DEFINED)
    entries = edited(entries, eos_token_id=u32(510))
    tokenizer = AutoTokenizer.from_pretrained(rebuild(write_vocab(tmp_path / "v.gguf", entries), tmp_path))
    assert tokenizer.eos_token == "<|end_header_id|>" and 510 in tokenizer.all_special_ids


def test_several_chat_templates(tmp_path):
    entries = vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512)
    entries = with_template(entries, "main", tool_use="tools {{ tools | length }}")
    folder = rebuild(write_vocab(tmp_path / "v.gguf", entries), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == {"default": "main", "tool_use": "tools {{ tools | length }}"}
    entries |= {"tokenizer.chat_template.../x": string("no")}
    with pytest.raises(InputError, match="chat template '../x' cannot be a file's name"):
        rebuild(write_vocab(tmp_path / "w.gguf", entries), tmp_path / "bad")


def test_hugging_face_files_are_copied(tmp_path):
    folder = make_sentencepiece(tmp_path / "tokenizer")
    (folder / "generation_config.json").write_text("{}")
    (folder / "stray.txt").write_text("not a tokenizer's")
    files = write_hf_tokenizer(folder, tmp_path / "out", model_config(480))
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    assert all(file.read_bytes() == (folder / file.name).read_bytes() for file in files)
    assert sorted(files) == sorted((tmp_path / "out").iterdir())


def test_unusable_folders_are_refused(tmp_path):
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(InputError, match="only no tokenizer at all; .*save_pretrained"):
        write_hf_tokenizer(tmp_path / "tokenizer", tmp_path / "out", model_config(512))
    (tmp_path / "tokenizer/vocab.json").write_bytes(b"x")
    with pytest.raises(InputError, match="no vocab.gguf, only vocab.json; .*save_pretrained"):
        write_hf_tokenizer(tmp_path / "tokenizer", tmp_path / "out", model_config(512))
    entries = vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512)
    GGUFFile(write_vocab(tmp_path / "v.gguf", entries)).write_metadata(tmp_path / "tokenizer/vocab.gguf",
                                                                     ("tokenizer.",))
    with pytest.raises(InputError, match="512 tokens, but the model has 511 embedding rows"):
        write_hf_tokenizer(tmp_path / "tokenizer", tmp_path / "out", model_config(511))
    assert not (tmp_path / "out").exists()
