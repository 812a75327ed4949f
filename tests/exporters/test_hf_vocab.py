"""Token ids: tokenizer.json rebuilt from a GGUF against real llama.cpp on that GGUF."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import array, boolean, string, u32
from optrot_edge.exporters.gguf_vocab import vocabulary
from optrot_edge.exporters.hf_vocab import read_vocabulary
from optrot_edge.exporters.pre_tokenizers import ALIASES
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_tokenizers import (
    BYTE_LEVEL,
    CASED,
    LARGE,
    NORMALISES,
    comparable,
    join_across_words,
    make_byte_level,
)
from tests.exporters.hf_folders import (
    CORPUS,
    adding,
    check_ids,
    edited,
    mixtures,
    rebuild,
    retyped,
    sentencepiece_entries,
    smollm2_path,
    write_vocab,
)
from tests.runtime.byte_llama import TEXT, write_tiny


def added_tokens(folder) -> dict[str, bool]:
    """Added tokens of tokenizer.json, and whether each is special."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}


def test_smollm2_ids_equal_llama_cpp(tmp_path):
    folder = rebuild(smollm2_path(), tmp_path)
    specials = added_tokens(folder)
    assert len(specials) == 17 and all(specials.values())
    check_ids(folder, smollm2_path(), CORPUS + mixtures(list(specials)))


@pytest.mark.parametrize("kind", BYTE_LEVEL)
def test_byte_level_round_trip(kind, tmp_path):
    """Hugging Face → GGUF → Hugging Face, with merges that any other way of splitting would trip over."""
    make_byte_level(tmp_path / "source", kind)
    join_across_words(tmp_path / "source")
    path = write_vocab(tmp_path / "v.gguf", vocabulary(tmp_path / "source", LARGE))
    folder = rebuild(path, tmp_path)
    texts = CORPUS + mixtures(list(added_tokens(folder)))
    check_ids(folder, path, [comparable(kind, text) if kind in CASED else text for text in texts])
    before, after = (Tokenizer.from_file(str(name / "tokenizer.json")) for name in (tmp_path / "source", folder))
    if kind in NORMALISES:  # llama.cpp does not normalise, and the copy does what llama.cpp does
        texts = [comparable(kind, text) for text in texts]
    assert all(before.encode(text).ids == after.encode(text).ids for text in texts)
    again, once = vocabulary(folder, LARGE), vocabulary(tmp_path / "source", LARGE)
    types = once["tokenizer.ggml.token_type"].value
    types[:] = [TokenType.NORMAL if kind == TokenType.UNUSED else kind for kind in types]  # padding
    assert again == once


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids_equal_llama_cpp(prefix, tmp_path):
    path = write_vocab(tmp_path / "v.gguf", sentencepiece_entries(tmp_path / "source", prefix=prefix))
    folder = rebuild(path, tmp_path)
    assert added_tokens(folder) == {"<unk>": True, "<s>": True, "</s>": True, "[[USER]]": False}
    runs = ["x" * before + " " * count + after for count in range(50) for before in (0, 1) for after in ("", "y")]
    check_ids(folder, path, CORPUS + mixtures(["<s>", "</s>", "<unk>", "[[USER]]", "<0x41>"]) + runs)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(tokenizer.encode("print the tokens", add_special_tokens=False).ids) < 12  # merges happen


def test_sentencepiece_round_trip(tmp_path):
    """Hugging Face → GGUF → Hugging Face, against the first."""
    entries = sentencepiece_entries(tmp_path / "source")
    plain = {key: entry for key, entry in vocabulary(tmp_path / "source", 512).items() if key in entries}
    folder = rebuild(write_vocab(tmp_path / "v.gguf", plain), tmp_path)
    before, after = (Tokenizer.from_file(str(name / "tokenizer.json")) for name in (tmp_path / "source", folder))
    for text in CORPUS + mixtures(["<s>", "</s>", "<unk>", "[[USER]]"]):
        assert before.encode(text).ids == after.encode(text).ids, text[:80]


def test_tiny_llama_ids_equal_llama_cpp(tmp_path):
    path = write_tiny(tmp_path / "m.gguf", extra_tokens=("Ġthe", "<|im_end|>"))
    folder = rebuild(path, tmp_path)
    check_ids(folder, path, [TEXT, *CORPUS, *mixtures(["<|bos|>", "<|eos|>", "<|user|>", "<|im_end|>"])])
    # an ordinary token by its type, but llama.cpp ends an answer at it
    assert added_tokens(folder) == dict.fromkeys(["<|bos|>", "<|eos|>", "<|user|>", "<|im_end|>"], True)


@pytest.mark.parametrize("kind", [TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.CONTROL])
@pytest.mark.parametrize("token", ["<|eot_id|>", "<|start_header_id|>"])
def test_token_types(token, kind, tmp_path):
    """Added tokens are found in plain text, control tokens are not, ordinary ones nowhere: as in llama.cpp."""
    entries = vocabulary(make_byte_level(tmp_path / "source", "llama-bpe"), 512)
    entries = edited(retyped(entries, token, kind), eos_token_id=u32(508))
    path = write_vocab(tmp_path / "v.gguf", entries)
    folder = rebuild(path, tmp_path)
    check_ids(folder, path, [f"a{token} b {token}{token}", *mixtures([token], 50)])
    wanted = {TokenType.NORMAL: None, TokenType.USER_DEFINED: False, TokenType.CONTROL: True}[kind]
    assert added_tokens(folder).get(token) is (True if token == "<|eot_id|>" else wanted)


def test_random_sentencepiece_vocabularies(tmp_path):
    """Any scores, equal ones among them: llama.cpp's ids, or refused."""
    rng, refused = random.Random(0), 0
    base = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 15]
    for trial in range(16):
        tokens = list(base)
        while len(tokens) < len(types):
            token = "".join(rng.choices("▁aabb", k=rng.randint(2, 6)))
            tokens += [token] if token not in tokens else []
        scores = [0.0] * len(base) + [-float(rng.randint(1, 1000 if trial % 2 else 12)) for _ in range(12)]
        path = write_vocab(tmp_path / "v.gguf", {
            "tokenizer.ggml.model": string("llama"), "tokenizer.ggml.tokens": array(tokens, GGUFValueType.STRING),
            "tokenizer.ggml.token_type": array(types, GGUFValueType.INT32),
            "tokenizer.ggml.scores": array(scores, GGUFValueType.FLOAT32)})
        try:
            folder = rebuild(path, tmp_path / str(trial))
        except InputError:
            refused += 1
            continue
        check_ids(folder, path, ["".join(rng.choices(" aabb", k=rng.randint(1, 30))) for _ in range(100)])
    assert 0 < refused < 8


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_split_alike(alias, tmp_path):
    make_byte_level(tmp_path / "source", ALIASES[alias])
    join_across_words(tmp_path / "source")
    entries = edited(vocabulary(tmp_path / "source", LARGE), pre=string(alias), add_bos_token=None,
                     bos_token_id=u32(0))
    path = write_vocab(tmp_path / "v.gguf", entries)
    kind = ALIASES[alias]
    check_ids(rebuild(path, tmp_path), path, [comparable(kind, text) if kind in CASED else text for text in CORPUS])
    backend = LlamaCppBackend(path, vocab_only=True)
    assert read_vocabulary(path).add_bos == backend.adds_bos == (ALIASES[alias] == "llama-bpe")
    backend.close()


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bos_and_eos_are_added(kind, bos, eos, tmp_path):
    if kind == "gpt2":
        entries = vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512)
    else:
        entries = sentencepiece_entries(tmp_path / "source")
    path = write_vocab(tmp_path / "v.gguf", adding(entries, bos=bos, eos=eos))
    tokenizer = Tokenizer.from_file(str(rebuild(path, tmp_path) / "tokenizer.json"))
    backend = LlamaCppBackend(path, vocab_only=True)
    assert backend.adds_bos == bos
    first, last = ([token] if wanted else [] for token, wanted in ((1, bos), (2, eos)))
    for text in ("Hi there", ""):
        plain = backend.tokenize(text, add_bos=False)
        assert tokenizer.encode(text).ids == [*first, *plain, *last]
    backend.close()


def test_defaults_of_a_silent_sentencepiece_file(tmp_path):
    silent = dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix", "bos_token_id", "eos_token_id",
                            "unknown_token_id"))
    path = write_vocab(tmp_path / "v.gguf", edited(sentencepiece_entries(tmp_path / "source"), **silent))
    found, backend = read_vocabulary(path), LlamaCppBackend(path, vocab_only=True)
    assert (found.add_bos, found.ids["bos"]) == (backend.adds_bos, backend.bos) == (True, 1)
    assert (found.ids["eos"], found.ids["unk"], found.add_eos, found.space_prefix) == (2, 0, False, True)
    backend.close()
    check_ids(rebuild(path, tmp_path), path, CORPUS)


def _tokens(entries, change):
    tokens = list(entries["tokenizer.ggml.tokens"].value)
    change(tokens)
    return edited(entries, tokens=array(tokens, GGUFValueType.STRING))


@pytest.mark.parametrize(("change", "message"), [
    (lambda e: edited(e, model=string("t5")), "tokenizer.ggml.model is 't5'; only 'gpt2' and 'llama'"),
    (lambda e: edited(e, pre=string("viking")), "tokenizer.ggml.pre is 'viking'.*known are llama-bpe"),
    (lambda e: edited(e, pre=None), "tokenizer.ggml.pre is ''"),
    (lambda e: edited(e, merges=None), "there are no merges"),
    (lambda e: edited(e, merges=array(["a zz"], GGUFValueType.STRING)), "do not join two"),
    (lambda e: edited(e, merges=array(["th"], GGUFValueType.STRING)), "do not join two"),
    (lambda e: edited(e, merges=u32(1)), "damaged"),
    (lambda e: edited(e, tokens=None), "damaged"),
    (lambda e: edited(e, token_type=None), "damaged"),
    (lambda e: edited(e, eos_token_id=None), "eos token is None"),
    (lambda e: edited(e, eos_token_id=u32(100)), "eos token is '.*', but it has to be a control token"),
    (lambda e: edited(e, eos_token_id=u32(512)), "not all among the 512 tokens"),
    (lambda e: edited(e, bos_token_id=None, add_bos_token=boolean(True)), "bos token is None"),
    (lambda e: _tokens(e, lambda tokens: tokens.__setitem__(7, tokens[8])), "holds a token twice"),
    (lambda e: e | {"general.name": string("Phi-3 mini")}, "phi-3"),
])
def test_unknown_and_damaged_vocabularies_are_refused(change, message, tmp_path):
    entries = vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512)
    path = write_vocab(tmp_path / "v.gguf", change(entries))
    with pytest.raises(InputError, match=rf"v.gguf: .*{message}.*Hugging Face folder"):
        read_vocabulary(path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda e: edited(e, scores=None), "finite score for every token"),
    (lambda e: edited(e, scores=array([float("nan")] * 512, GGUFValueType.FLOAT32)), "finite score"),
    (lambda e: edited(e, scores=array([-1000.0] * 512, GGUFValueType.FLOAT32)), "have the same score"),
    (lambda e: _tokens(e, lambda tokens: tokens.__setitem__(3, "<0xZZ>")), "byte token <0x00> is missing"),
])
def test_unusable_sentencepiece_vocabularies_are_refused(change, message, tmp_path):
    path = write_vocab(tmp_path / "v.gguf", change(sentencepiece_entries(tmp_path / "source")))
    with pytest.raises(InputError, match=rf"v.gguf: .*{message}.*Hugging Face folder"):
        read_vocabulary(path)


def test_needs_tokenizers_only_when_used(tmp_path):
    path = write_vocab(tmp_path / "v.gguf", vocabulary(make_byte_level(tmp_path / "source", "smollm"), 512))
    code = f"""
import sys
sys.modules |= dict.fromkeys(["tokenizers", "torch", "transformers", "mlx"])
from optrot_edge.exporters import hf_tokenizer, hf_vocab
try:
    hf_vocab.build_tokenizer(hf_vocab.read_vocabulary({str(path)!r}))
except hf_tokenizer.InputError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "optrot-edge[mlx]"' in run.stdout, run.stderr
