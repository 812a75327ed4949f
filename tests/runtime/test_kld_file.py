"""llama-perplexity's files of log-probabilities: to the byte, damaged, and both ways with the tool itself."""

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.errors import InputError
from optrot_edge.runtime.backends import kind_of
from optrot_edge.runtime.evaluate import evaluate_package, write_reference_file
from optrot_edge.runtime.kld_file import compress, cut_chunks, read_kld, write_kld
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.metrics import log_softmax
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.llama_perplexity import compare_with, write_base
from tests.runtime.byte_llama import TEXT, write_tiny
from tests.runtime.test_evaluate import KEYS
from tests.runtime.test_reference_file import Given, full_kl, random_case

# Three chunks of 9 tokens of TEXT, by llama-perplexity (llama.cpp of llama-cpp-python 0.3.36) from the model `tiny`;
# what it printed: its perplexity, and the verdict on `noisy`.
MADE_BY_TOOL = Path(__file__).with_name("llama_perplexity.kld")
TOOL_PPL, TOOL_KL, TOOL_PPL_NOISY, TOOL_TOP1 = 586.1156, 0.07745, 619.5541, 0.5


def layout(logits, tokens) -> bytes:
    """The file, number by number."""
    b, n, vocab = logits.shape
    out = b"_logits_" + struct.pack("<iii", n, vocab, b) + struct.pack(f"<{b * n}i", *tokens.reshape(-1).tolist())
    for window in logits.astype(np.float32):
        for row in window[n // 2:n - 1]:
            top = max(row)
            low = max(min(row), np.float32(top - np.float32(16)))
            total = np.float32(np.log(sum(float(np.exp(x - top)) for x in row)))
            scale = np.float32((top - low) / np.float32(65535))
            inverse = np.float32(1) / scale
            codes = [int(np.rint(inverse * (x - low))) if x > low else 0 for x in row]
            out += struct.pack("<ff", scale, low - top - total)
            out += struct.pack(f"<{vocab + vocab % 2}H", *codes, *[0] * (vocab % 2))
    return out


@pytest.mark.parametrize("vocab", [40, 41])
@pytest.mark.parametrize("length", [8, 9])
@pytest.mark.parametrize("scale", [1.0, 12.0])
def test_layout_to_the_byte(tmp_path, vocab, length, scale):
    logits, _, tokens = random_case(scale, 0, vocab)
    logits, tokens, path = logits[:, :length], tokens[:, :length], tmp_path / "r.kld"
    made = write_kld(path, Given(logits), tokens, bos=None)
    assert path.read_bytes() == layout(logits, tokens)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.kld"]
    assert (made.vocab_size, made.first, made.rows.shape) == (vocab, length // 2, (2, length - 1 - length // 2))
    np.testing.assert_array_equal(made.tokens, tokens)


def test_what_16_bits_keep(tmp_path):
    """Log-probabilities to half a step as far down as 16 nats, the targets' among them; equal logits are allowed."""
    logits, package, tokens = random_case(2.0, 0.5)
    made = write_kld(tmp_path / "r.kld", Given(logits), tokens, bos=None)
    for window in range(2):
        exact = log_softmax(logits[window, made.first:-1])
        stored = made.log_probs(window, slice(None))
        assert np.abs(stored - exact).max() <= 16 / 65535 / 2 + 3e-6
        np.testing.assert_allclose(made.nll[window], -exact[np.arange(19), tokens[window, 21:]], atol=2e-4)
        kl, gap, _, agree = made.compare(window, package[window, made.first:])
        np.testing.assert_allclose(kl, full_kl(logits[window], package[window])[made.first:], atol=2e-4)
        assert not gap.any() and (agree == (exact.argmax(-1) == package[window, 20:-1].argmax(-1))).all()
    flat = compress(np.full((1, 5), 3.0))
    assert flat["scale"] == 0 and flat["low"] == pytest.approx(-np.log(5)) and not flat["codes"].any()
    steep = compress(np.array([[50.0, 0.0, 49.0]]))
    assert steep["codes"][0].tolist() == [65535, 0, round(15 / 16 * 65535), 0]


def test_a_file_by_the_tool(tiny, noisy):
    """What the real tool wrote gives the numbers that it printed."""
    assert kind_of(MADE_BY_TOOL) == "reference"
    same = evaluate_package(tiny, reference=MADE_BY_TOOL, text=TEXT, speed=False)
    assert same.keys() == KEYS | {"first_position"}
    assert same["ppl"] == pytest.approx(TOOL_PPL, rel=1e-3)
    assert same["ppl_reference"] == pytest.approx(TOOL_PPL, rel=2e-5)
    assert abs(same["kl_mean"]) < 1e-4 and not same["kl_is_lower_bound"]
    assert (same["windows"], same["window"], same["first_position"], same["tokens"]) == (3, 9, 4, 12)
    report = evaluate_package(noisy, reference=MADE_BY_TOOL, speed=False)
    assert report["kl_mean"] == pytest.approx(TOOL_KL, rel=5e-3)
    assert report["ppl"] == pytest.approx(TOOL_PPL_NOISY, rel=1e-3) and report["top1"] == TOOL_TOP1
    assert report["text_sha256"] is None and report["reference"].startswith("the model behind")


@pytest.mark.parametrize("backend", ["llama.cpp", "torch"])
def test_ours_is_the_tools(tiny, tmp_path, backend):
    """Header and tokens to the byte, log-probabilities as far as another runtime or CPU may differ."""
    path = tmp_path / "r.kld"
    made = write_reference_file(tiny, path, text=TEXT, window=9, windows=3, backend=backend)
    theirs = read_kld(MADE_BY_TOOL)
    assert path.stat().st_size == MADE_BY_TOOL.stat().st_size
    assert path.read_bytes()[:20 + 4 * 27] == MADE_BY_TOOL.read_bytes()[:20 + 4 * 27]
    for chunk in range(3):
        difference = made.log_probs(chunk, slice(None)) - theirs.log_probs(chunk, slice(None))
        assert np.abs(difference).max() < 0.01


@pytest.mark.parametrize("add_bos", [True, False])
def test_the_same_positions_without_a_file(tiny, noisy, tmp_path, add_bos):
    """KL and perplexity of the second halves, by hand; BOS takes the first token's place only where it is added."""
    models = [write_tiny(tmp_path / f"{noise}.gguf", noise=noise, add_bos=add_bos) for noise in (0.0, 0.1)]
    made = write_reference_file(models[0], tmp_path / "r.kld", text=TEXT + "\n", window=32, windows=4)
    report = evaluate_package(models[1], reference=tmp_path / "r.kld", text=TEXT, speed=False)
    with TorchBackend(models[0]) as original, LlamaCppBackend(models[1]) as package:
        ids = package.tokenize(TEXT)
        tokens = np.array(ids[:128]).reshape(4, 32)
        assert (made.tokens == tokens).all() and (ids[0] == 0) == add_bos
        if add_bos:
            tokens[:, 0] = 0
        p, q = (backend.logits_batch(tokens)[:, 16:] for backend in (original, package))
    kl = np.array([full_kl(a, b) for a, b in zip(p, q, strict=True)])
    nll = [-log_softmax(b)[np.arange(15), window[17:]] for b, window in zip(q, tokens, strict=True)]
    assert report["kl_mean"] == pytest.approx(kl.mean(), rel=1e-3) and kl.mean() > 0.01
    np.testing.assert_allclose(report["window_kl"], kl.mean(-1), rtol=5e-3)
    assert report["ppl"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-9)


def test_mlx_packages(mlx, tmp_path):
    pytest.importorskip("mlx_lm")
    source, folder = mlx("llama3_rope", quantize=True, q_bits=4, q_group_size=32)
    check_kinds(source, folder, tmp_path)


def test_onnx_packages(genai, tmp_path):
    pytest.importorskip("onnxruntime_genai")
    check_kinds(*genai("qwen3", "int4"), tmp_path)


def check_kinds(source, package, folder):
    """A GGUF's file serves a package of another kind of the same model, with BOS where the model adds it."""
    pipeline.export(source, folder / "m.gguf", format="gguf", type="f32", embedding_type="f32", head_type="f32",
                    rotation="none", quantizer="rtn", calibration="none")
    write_reference_file(folder / "m.gguf", folder / "r.kld", text=TEXT, window=64, windows=3, backend="llama.cpp")
    report = evaluate_package(package, reference=folder / "r.kld", text=TEXT, speed=False)
    write_reference_file(source, folder / "torch.kld", text=TEXT, window=64, windows=3)
    ours = evaluate_package(package, reference=folder / "torch.kld", speed=False)
    assert report["kl_mean"] == pytest.approx(ours["kl_mean"], rel=0.02) and ours["kl_mean"] > 1e-3
    float_model = evaluate_package(folder / "m.gguf", reference=folder / "torch.kld", speed=False)
    assert float_model["kl_mean"] < 1e-3 < ours["kl_mean"]


def spoilt(path: Path, change) -> Path:
    data = bytearray(MADE_BY_TOOL.read_bytes())
    path.write_bytes(change(data) or data)
    return path


def put(at: int, form: str, value):
    return lambda data: struct.pack_into(form, data, at, value)


ROWS, ROW = 20 + 4 * 27, 8 + 2 * 262


@pytest.mark.parametrize(("change", "says"), [
    (lambda data: data[:15], "not a file of log-probabilities"),
    (put(0, "8s", b"_logit__"), "not a file of log-probabilities"),
    (put(8, "<i", 2), "damaged: 3 chunks of 2 tokens"),
    (put(12, "<i", -1), "a vocabulary of -1"),
    (put(16, "<i", 0), "damaged: 0 chunks"),
    (lambda data: data[:-1], "cut off: 6,511 bytes of 6,512, 2 of 3 chunks"),
    (lambda data: data[:60], "cut off.*0 of 3 chunks"),
    (lambda data: data + b"\0", "1 bytes too long"),
    (put(12, "<i", 300), "cut off"),
    (put(24, "<i", 261), "token ids outside the vocabulary of 261"),
    (put(ROWS, "<f", float("nan")), "impossible scales in chunk 0"),
    (put(ROWS + 5 * ROW, "<f", -1e-4), "impossible scales in chunk 1"),
    (put(ROWS + 8 * ROW + 4, "<f", 0.5), "impossible scales in chunk 2"),
    (put(ROWS + 8 * ROW + 4, "<f", float("-inf")), "impossible scales in chunk 2"),
    (put(ROWS + 4 * ROW + 4, "<f", -30.0), "probabilities of chunk 1 do not sum to one"),
])
def test_damage(tiny, tmp_path, change, says):
    path = spoilt(tmp_path / "bad.kld", change)
    with pytest.raises(InputError, match=says):
        evaluate_package(tiny, reference=path, speed=False)


def test_other_models_and_texts(tiny, tmp_path):
    more = write_tiny(tmp_path / "more.gguf", extra_tokens=("xy",))
    with pytest.raises(InputError, match="the package has 262 tokens and the reference the model behind .* has 261"):
        evaluate_package(more, reference=MADE_BY_TOOL, speed=False)
    plain = write_tiny(tmp_path / "plain.gguf", add_bos=False)
    with pytest.raises(InputError, match=r"does not add BOS \(id 0\), but llama_perplexity.kld begins with it"):
        evaluate_package(plain, reference=MADE_BY_TOOL, speed=False)
    write_reference_file(plain, tmp_path / "plain.kld", text=TEXT, window=9, windows=3)
    with pytest.raises(InputError, match=r"adds BOS \(id 0\), but plain.kld does not begin with it"):
        evaluate_package(tiny, reference=tmp_path / "plain.kld", speed=False)
    for text in (TEXT.replace("quick", "slow"), TEXT[:4]):
        with pytest.raises(InputError, match="from another text or with another tokenizer: it differs from token 5 on"):
            evaluate_package(tiny, reference=MADE_BY_TOOL, text=text, speed=False)
    with pytest.raises(InputError, match="windows of 9 tokens, not 12"):
        evaluate_package(tiny, reference=MADE_BY_TOOL, window=12, speed=False)


def test_unusable_requests(tiny, tmp_path):
    with pytest.raises(InputError, match="leave --top-k out"):
        write_reference_file(tiny, tmp_path / "r.kld", text=TEXT, top_k=8)
    with pytest.raises(InputError, match="which is 0 chunks of 512, but 1"):
        write_reference_file(tiny, tmp_path / "r.kld", text="too short")
    with pytest.raises(InputError, match="at least 3"):
        cut_chunks([1] * 9, 2, None, 32)
    with pytest.raises(InputError, match="0 chunks"):
        cut_chunks([1] * 9, 3, 0, 32)
    assert cut_chunks(list(range(20)), 3, None, 4).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    logits, _, tokens = random_case(1.0, 0)
    logits[1, 30, 3] = np.inf
    with pytest.raises(InputError, match="non-finite logits in window 1"):
        write_kld(tmp_path / "r.kld", Given(logits), tokens, bos=None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="cannot write"):
        write_kld(MADE_BY_TOOL / "r.kld", Given(logits), tokens, bos=None)


def test_the_tool_reads_ours(tiny, noisy, tmp_path):
    """llama-perplexity, on a file from torch, finds the KL that our evaluation of the same positions finds."""
    write_reference_file(tiny, tmp_path / "r.kld", text=TEXT, window=64, windows=6)
    theirs = compare_with(noisy, tmp_path / "r.kld")
    ours = evaluate_package(noisy, reference=tmp_path / "r.kld", speed=False)
    assert ours["tokens"] == 6 * 31
    for key in ("kl_mean", "kl_max", "kl_median", "kl_p90", "ppl", "ppl_reference"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3), key
    assert ours["top1"] == pytest.approx(theirs["top1"], abs=1e-4)


@pytest.mark.parametrize("n_ctx", [64, 77])
def test_the_tools_is_ours(tiny, noisy, tmp_path, n_ctx):
    """The same library on the same text: the same codes, and its numbers from its own file."""
    text, theirs, ours = tmp_path / "text.txt", tmp_path / "logits.bin", tmp_path / "ours.kld"
    text.write_bytes((TEXT + "\n\n").encode())
    ppl = write_base(tiny, text, theirs, n_ctx, "--chunks", 5)
    write_reference_file(tiny, ours, text=TEXT + "\n\n", window=n_ctx, windows=5, backend="llama.cpp")
    a, b = read_kld(theirs), read_kld(ours)
    assert (a.tokens == b.tokens).all() and a.rows.shape == b.rows.shape
    assert np.abs(a.rows["codes"].astype(int) - b.rows["codes"])[..., :261].max() <= 1
    report = evaluate_package(noisy, reference=theirs, text=TEXT + "\n\n", speed=False)
    verdict = compare_with(noisy, theirs)
    assert report["kl_mean"] == pytest.approx(verdict["kl_mean"], rel=1e-4)
    assert report["ppl_reference"] == pytest.approx(ppl, rel=1e-4)


def test_a_copy_may_have_any_name(tiny, tmp_path):
    shutil.copy(MADE_BY_TOOL, tmp_path / "base.dat")
    assert evaluate_package(tiny, reference=tmp_path / "base.dat", windows=2, speed=False)["windows"] == 2
    (tmp_path / "empty.kld").write_bytes(b"")
    with pytest.raises(InputError, match="not a file of log-probabilities"):
        evaluate_package(tiny, reference=tmp_path / "empty.kld", speed=False)
