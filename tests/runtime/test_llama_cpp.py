"""The llama.cpp backend on real GGUFs, sound and damaged."""

import random
import struct

import gguf
import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.runtime.backends import bits_per_weight
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.runtime.byte_llama import CONTEXT, HEADS, HIDDEN, KV_HEADS, LAYERS, TEXT, write_tiny


def forward(path, tokens):
    """The model in float64 numpy, from the tensors gguf-py reads: logits [n, vocab]."""
    w = {t.name: t.data.astype(np.float64) for t in gguf.GGUFReader(str(path)).tensors}
    n, dim = len(tokens), HIDDEN // HEADS
    angles = np.outer(np.arange(n), 10000.0 ** (-np.arange(0, dim, 2) / dim))

    def norm(x, gain):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain

    def rope(x):  # llama.cpp turns neighbours
        a, b, c, s = x[..., 0::2], x[..., 1::2], np.cos(angles)[:, None], np.sin(angles)[:, None]
        return np.stack([a * c - b * s, a * s + b * c], -1).reshape(x.shape)

    x = w["token_embd.weight"][tokens]
    for i in range(LAYERS):
        b = f"blk.{i}."
        h = norm(x, w[b + "attn_norm.weight"])
        q = rope((h @ w[b + "attn_q.weight"].T).reshape(n, HEADS, dim))
        k = rope((h @ w[b + "attn_k.weight"].T).reshape(n, KV_HEADS, dim)).repeat(HEADS // KV_HEADS, 1)
        v = (h @ w[b + "attn_v.weight"].T).reshape(n, KV_HEADS, dim).repeat(HEADS // KV_HEADS, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / dim**0.5
        scores[:, np.triu_indices(n, 1)[0], np.triu_indices(n, 1)[1]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", p, v).reshape(n, -1) @ w[b + "attn_output.weight"].T
        h = norm(x, w[b + "ffn_norm.weight"])
        gate = h @ w[b + "ffn_gate.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[b + "ffn_up.weight"].T)) @ w[b + "ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w["output.weight"].T


def error(got, expected):
    """Root mean square difference, relative to the spread of the logits."""
    return np.sqrt(np.mean((got - expected) ** 2)) / np.std(expected)


@pytest.mark.parametrize("n_batch", [7, 512])
def test_logits_equal_a_float64_forward(tiny, n_batch):
    """Also when a window takes several `llama_decode` calls. Keys and values are cached in float16."""
    tokens = np.random.default_rng(0).integers(0, 261, 300)
    with LlamaCppBackend(tiny, n_batch=n_batch) as backend:
        got = backend.logits(tokens)
    assert got.dtype == np.float32
    assert got.shape == (300, 261)
    assert error(got, forward(tiny, tokens)) < 4e-3


def test_windows_do_not_see_each_other(tiny):
    """A batch and a re-used context give what a fresh single window gives."""
    tokens = np.random.default_rng(1).integers(0, 261, (3, 50))
    fresh = []
    for window in tokens:
        with LlamaCppBackend(tiny) as backend:
            fresh.append(backend.logits(window))
    with LlamaCppBackend(tiny) as backend:
        np.testing.assert_array_equal(backend.logits_batch(tokens), fresh)
        backend.logits(np.arange(261))  # more than the context taken so far
        np.testing.assert_array_equal(backend.logits(tokens[0]), fresh[0])


def test_tokens_and_bos(tiny, tmp_path):
    with LlamaCppBackend(tiny, vocab_only=True) as backend:
        assert (backend.vocab_size, backend.context_length) == (261, CONTEXT)
        assert (backend.adds_bos, backend.bos) == (True, 0)
        ids = backend.tokenize(TEXT, add_bos=False)
        assert backend.detokenize(ids) == TEXT
        assert backend.tokenize(TEXT) == [0, *ids] == backend.tokenize(TEXT, add_bos=True)
        assert backend.tokenize("the", add_bos=False) == [259, 3 + ord("e")]
        assert backend.tokenize("<|user|>", add_bos=False, special=True) == [2]
        assert len(backend.tokenize("<|user|>", add_bos=False)) == 8
        assert backend.detokenize([2, 259], special=False) == "th"
        assert backend.tokenize("", add_bos=False) == []
        assert backend.detokenize([]) == ""
        with pytest.raises(InputError, match="unicode"):
            backend.tokenize("\ud800")
        with pytest.raises(InputError, match="token ids"):
            backend.detokenize([261])
        with pytest.raises(InputError, match="vocab_only"):
            backend.logits([1])
    with LlamaCppBackend(write_tiny(tmp_path / "plain.gguf", add_bos=False), vocab_only=True) as backend:
        assert not backend.adds_bos
        assert backend.tokenize("the") == [259, 3 + ord("e")]


def test_what_does_not_fit(tiny):
    with LlamaCppBackend(tiny) as backend:
        assert backend.logits(np.zeros(CONTEXT, int)).shape == (CONTEXT, 261)
        for tokens, match in ((np.zeros(CONTEXT + 1, int), "context"), ([261], "token ids"),
                              ([-1], "token ids"), ([], "no tokens"), ([[1]], "one sequence")):
            with pytest.raises(InputError, match=match):
                backend.logits(tokens)
        with pytest.raises(InputError, match="context"):
            backend.generate([1], CONTEXT)
    with LlamaCppBackend(tiny, n_ctx=10) as backend, pytest.raises(InputError, match="context of 10"):
        backend.logits(np.zeros(11, int))
    with pytest.raises(InputError, match="device"):
        LlamaCppBackend(tiny, device="tpu")


def test_chat_is_greedy_through_the_template(tiny, noisy):
    with LlamaCppBackend(tiny) as backend:
        prompt = [0, 2, *backend.tokenize("Hi there", add_bos=False)]
        expected = []
        while len(expected) < 12:
            token = int(backend.logits([*prompt, *expected])[-1].argmax())
            if token == 1:
                break
            expected.append(token)
        assert backend.generate(prompt, 12) == expected
        assert backend.chat("Hi there", 12) == backend.detokenize(expected, special=False).strip()
    with LlamaCppBackend(noisy) as backend, pytest.raises(InputError, match="chat template"):
        backend.chat("Hi")


@pytest.mark.parametrize(("template", "says"), [
    ("{{ raise_exception('a system\n message first') }}", "a system message"), ("{% for %}", "Expected an expression"),
    ("{{ nobody.nothing }}", "nobody")])
def test_templates_that_fail(template, says, tmp_path):
    path = write_tiny(tmp_path / "m.gguf", chat=template)
    with LlamaCppBackend(path) as backend, pytest.raises(InputError, match=f"its chat template fails: .*{says}"):
        backend.chat("Hi")


def test_speed(tiny):
    with LlamaCppBackend(tiny) as backend:
        speed = backend.speed(prompt_tokens=64, decode_tokens=8)
    assert speed.keys() == {"prefill_tokens_per_s", "decode_tokens_per_s"}
    assert all(1 < value < 1e8 for value in speed.values())


def test_close_twice(tiny):
    backend = LlamaCppBackend(tiny)
    backend.logits([1, 2])
    backend.close()
    backend.close()


def refused(path):
    with pytest.raises(InputError) as caught:
        LlamaCppBackend(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unusable_files(tiny, tmp_path):
    whole = tiny.read_bytes()
    path = tmp_path / "bad.gguf"
    assert "cannot be read" in refused(path)
    for content in (b"", b"GGUF", whole[:100], whole[:-1], b"GGML" + whole[4:],
                    whole[:4] + struct.pack("<I", 1) + whole[8:], whole[:8] + b"\xff" * 8 + whole[16:]):
        path.write_bytes(content)
        assert str(path) in refused(path)
    assert refused(tmp_path)


@pytest.mark.parametrize(("old", "new", "match"), [
    (b"llama", b"lamma", "unknown model architecture"),  # every key keeps its length
    (b"blk.1.attn_q.weight", b"blk.1.attn_x.weight", "attn_q"),
    (b"tokenizer.ggml.model", b"tokenizer.ggml.mudel", "tokenizer"),
    (b"llama.block_count", b"llama.block_cound", "block_count"),
])
def test_unsupported_files_name_the_reason(tiny, tmp_path, old, new, match):
    path = tmp_path / "odd.gguf"
    path.write_bytes(tiny.read_bytes().replace(old, new))
    assert match in refused(path)


def test_an_abort_inside_llama_cpp_is_survived(tmp_path):
    """llama.cpp calls abort() on a token that is listed twice; only the probing child process dies."""
    message = refused(write_tiny(tmp_path / "twice.gguf", extra_tokens=("th",)))
    assert "GGML_ASSERT" in message
    assert "/" not in message.partition("cannot load it")[2]  # no path of somebody's build


def test_inconsistent_numbers(tiny, tmp_path):
    for key, value in ((b"llama.attention.head_count", 0), (b"llama.rope.dimension_count", 2**31),
                       (b"llama.feed_forward_length", 0), (b"llama.embedding_length", 2**31)):
        data = bytearray(tiny.read_bytes())
        at = data.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
        data[at:at + 4] = struct.pack("<I", value)
        path = tmp_path / "odd.gguf"
        path.write_bytes(data)
        assert "llama.cpp cannot load it" in refused(path)


@pytest.mark.slow
def test_flipped_headers_never_crash(tiny, tmp_path):
    """Random bytes of the header changed: an InputError or a model that still runs."""
    whole = tiny.read_bytes()
    header_end = whole.index(b"blk.1.ffn_down.weight") + 60
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for _ in range(25):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(8, header_end)] = rng.randrange(256)
        path = tmp_path / "flip.gguf"
        path.write_bytes(data)
        try:
            with LlamaCppBackend(path) as backend:
                backend.logits([3, 4])
                outcomes[True] += 1
        except InputError:
            outcomes[False] += 1
    assert outcomes[True] and outcomes[False]


def test_bits_per_weight(tiny, tmp_path):
    assert bits_per_weight(tiny) == 32
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "llama")
    weights = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor("a.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("b.weight", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert bits_per_weight(tmp_path / "q.gguf") == pytest.approx((256 * 4.5 + 64 * 32) / 320)
