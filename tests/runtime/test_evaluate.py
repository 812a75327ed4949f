"""Whole evaluations on tiny packages."""

import json
import shutil

import numpy as np
import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import CheckpointWriter, QuantizedTensor, grid_spec
from optrot_edge.errors import InputError
from optrot_edge.models.config import ModelConfig
from optrot_edge.quantize.calibration import load_text
from optrot_edge.runtime.backends import bits_per_weight, open_package, open_reference
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.runtime.evaluate import evaluate_package, write_reference_file, write_report
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from optrot_edge.runtime.metrics import Scores
from optrot_edge.runtime.text import cut_windows, read_text, text_sha256
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.runtime.byte_llama import TEXT, write_tiny
from tests.tiny_models import random_tokens, save_tiny

KEYS = {"kl_mean", "kl_se", "kl_median", "kl_p90", "kl_p99", "kl_max", "ppl", "ppl_se", "ppl_reference",
        "ppl_reference_se", "top1", "top1_se", "nonfinite", "nonfinite_windows", "tokens", "windows",
        "window", "window_kl", "seconds", "bytes", "bits_per_weight", "reference", "reference_runtime",
        "package", "runtime", "device", "text_sha256", "kl_is_lower_bound",
        "prefill_tokens_per_s", "decode_tokens_per_s"}


def test_report_against_a_model(tiny, noisy, tmp_path):
    seen = []
    report = evaluate_package(noisy, reference=tiny, text=TEXT, windows=3, window=64,
                              progress=lambda *step: seen.append(step))
    assert report.keys() == KEYS
    assert (report["windows"], report["window"], report["tokens"]) == (3, 64, 3 * 63)
    assert report["reference_runtime"].startswith("torch (torch 2")
    assert "float32" in report["reference_runtime"]
    assert report["runtime"].startswith("llama.cpp (llama-cpp-python")
    assert report["bytes"] == noisy.stat().st_size
    assert report["bits_per_weight"] == 32
    assert report["nonfinite"] == 0
    assert not report["kl_is_lower_bound"]
    assert report["decode_tokens_per_s"] > 1
    assert ("windows" in {what for *_, what in seen}) and seen[-1][:2] == (3, 3)
    with LlamaCppBackend(tiny) as a, LlamaCppBackend(noisy) as b:  # by hand
        tokens = cut_windows(a.tokenize(TEXT, add_bos=False), 64, 3, bos=0)
        scores = Scores()
        for p, q, window in zip(a.iter_logits(tokens), b.iter_logits(tokens), tokens, strict=True):
            scores.add(p, q, window)
    expected = scores.summary()
    for key in ("kl_mean", "kl_p99", "ppl", "ppl_reference"):
        assert report[key] == pytest.approx(expected[key], rel=5e-3), key
    assert report["kl_mean"] > 0.01
    path = tmp_path / "deep" / "report.json"
    write_report(path, report)
    assert json.loads(path.read_text()) == report
    with pytest.raises(InputError, match="cannot write"):
        write_report(path / "x.json", report)


@pytest.mark.parametrize("backend", ["llama.cpp", "torch"])
def test_a_package_against_itself(tiny, backend):
    report = evaluate_package(tiny, reference=tiny, text=TEXT, windows=2, window=32, backend=backend,
                              reference_backend=backend, speed=False)
    assert report["kl_max"] == 0
    assert report["top1"] == 1
    assert report["ppl"] == report["ppl_reference"]
    assert report["runtime"] == report["reference_runtime"]
    assert report["decode_tokens_per_s"] is None


def test_torch_and_llama_cpp_agree(tiny):
    report = evaluate_package(tiny, reference=tiny, text=TEXT, windows=2, window=128, speed=False)
    assert report["kl_max"] < 1e-4
    assert report["top1"] > 0.98


@pytest.mark.parametrize("device", ["webgpu", "dml", "cuda"])
def test_a_reference_in_torch_where_torch_lacks_the_package_s_device(tiny, device):
    """It runs on the CPU, which the report says; alone it is refused."""
    with open_reference(tiny, "torch", device, beside_package=True) as original:
        assert original.version.endswith("cuda" if device == "cuda" and torch.cuda.is_available() else "cpu")
    if device != "cuda" or not torch.cuda.is_available():
        with pytest.raises(InputError, match=f"torch cannot use the device '{device}' here; use --device cpu"):
            open_reference(tiny, "torch", device)


def test_line_ends_are_kept(tmp_path):
    """llama.cpp's tools read bytes."""
    (tmp_path / "t.txt").write_bytes(b"one line\r\nanother\n")
    assert read_text(tmp_path / "t.txt") == load_text(str(tmp_path / "t.txt")) == "one line\r\nanother\n"


def test_report_against_a_reference_file(tiny, noisy, tmp_path):
    path = tmp_path / "ref.json.gz"
    write_reference_file(tiny, path, text=TEXT, windows=3, window=64, top_k=32)
    report = evaluate_package(noisy, reference=path, speed=False)
    assert report.keys() == KEYS | {"kl_upper_bound", "kl_estimate", "kl_estimate_se"}
    full = evaluate_package(noisy, reference=tiny, text=TEXT, windows=3, window=64, speed=False)
    assert report["kl_is_lower_bound"]
    assert report["kl_mean"] < full["kl_mean"] < report["kl_upper_bound"]
    assert report["ppl"] == full["ppl"]
    assert report["ppl_reference"] == pytest.approx(full["ppl_reference"], rel=1e-6)
    assert report["top1"] == full["top1"]
    assert report["text_sha256"] == text_sha256(TEXT)
    assert evaluate_package(noisy, reference=path, text=TEXT, windows=2, speed=False)["windows"] == 2
    for options, match in (({"text": TEXT + "."}, "another text"), ({"window": 65}, "windows of 64"),
                           ({"windows": 4}, "holds 3 windows")):
        with pytest.raises(InputError, match=match):
            evaluate_package(noisy, reference=path, **options)


def test_reference_file_knows_a_wrong_tokenizer(tiny, tmp_path):
    """Ids of the probe text are compared: here two byte tokens have changed places."""
    path = tmp_path / "ref.json"
    write_reference_file(tiny, path, text=TEXT, windows=1, window=16)
    data = tiny.read_bytes()
    a, b = (b"\x01" + b"\0" * 7 + letter for letter in (b"e", b"o"))
    swapped = tmp_path / "swapped.gguf"
    swapped.write_bytes(data.replace(a, b"??").replace(b, a).replace(b"??", b))
    with pytest.raises(InputError, match="tokenizers of swapped.gguf"):
        evaluate_package(swapped, reference=path)
    with pytest.raises(InputError, match="tokenizers of swapped.gguf"):
        evaluate_package(swapped, reference=tiny, text=TEXT)
    without = write_tiny(tmp_path / "without.gguf", add_bos=False)
    with pytest.raises(InputError, match="BOS"):
        evaluate_package(without, reference=tiny, text=TEXT)
    bigger = write_tiny(tmp_path / "bigger.gguf", extra_tokens=("zzz",))
    for reference in (path, tiny):
        with pytest.raises(InputError, match="not the same model"):
            evaluate_package(bigger, reference=reference, text=TEXT, window=16, windows=1)


def test_nonfinite_package_is_reported(tmp_path, tiny):
    def poison(name, array):
        if name == "token_embd.weight":
            array = array.copy()
            array[3 + ord("q")] = np.nan  # every window that reads a q
        return array

    broken = write_tiny(tmp_path / "nan.gguf", change=poison)
    text = "all sound here. " * 8 + "quite broken here. " * 8
    report = evaluate_package(broken, reference=tiny, text=text, window=32, speed=False)
    assert report["nonfinite_windows"] > 0
    assert report["nonfinite"] >= 261
    assert report["kl_mean"] is None and report["ppl"] is None
    assert report["finite_windows"]["kl_mean"] < 1e-4
    assert report["window_kl"].count(None) == report["nonfinite_windows"] < report["windows"]
    write_report(tmp_path / "report.json", report)
    with pytest.raises(InputError, match="cannot serve as a reference"):
        evaluate_package(tiny, reference=broken, text=text, window=32, speed=False,
                         reference_backend="llama.cpp")


@pytest.mark.parametrize(("text", "options", "match"), [
    ("", {}, "empty"), (" \n", {}, "empty"), (None, {}, "empty"), ("short", {}, "longer text"),
    (TEXT, {"window": 513}, "context"), (TEXT, {"windows": 1000}, "1000 are needed"),
    (TEXT, {"windows": 0}, "at least 1"), (TEXT, {"window": 1}, "at least 2"),
    ("\udcff" * 900, {}, "unicode"), (TEXT, {"backend": "jax"}, "unknown backend"),
    (TEXT, {"device": "tpu"}, "device"),
])
def test_unusable_requests(tiny, text, options, match):
    with pytest.raises(InputError, match=match):
        evaluate_package(tiny, reference=tiny, text=text, **options)


def test_unusable_paths(tiny, tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"odd")
    unusable = {tmp_path / "none": "no such", tmp_path: "neither", tmp_path / "odd.bin": "neither"}
    for path, match in unusable.items():
        with pytest.raises(InputError, match=match):
            evaluate_package(path, reference=tiny, text=TEXT)
        with pytest.raises(InputError, match=match):
            evaluate_package(tiny, reference=path, text=TEXT)
    folder = save_tiny(tmp_path / "hf", "llama")
    with pytest.raises(InputError, match="not a package"):
        open_package(folder)
    with pytest.raises(InputError, match="runs in torch or mlx only, not in llama.cpp"):
        open_reference(folder, "llama.cpp")


def test_text_files(tmp_path):
    path = tmp_path / "text"
    for content, match in ((b"caf\xe9 latin", "UTF-8"), (b" \n", "empty"), (b"", "empty")):
        path.write_bytes(content)
        with pytest.raises(InputError, match=match):
            read_text(path)
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "none")
    path.write_text("naïve", encoding="utf-8")
    assert read_text(path) == "naïve"


@pytest.mark.parametrize(("count", "window", "windows", "bos"), [(100, 10, 10, None), (101, 10, 7, 5),
                                                               (640, 20, None, None), (641, 21, None, 3)])
def test_windows_are_even_and_disjoint(count, window, windows, bos):
    ids = list(range(1000, 1000 + count))
    cut = cut_windows(ids, window, windows, bos=bos)
    assert cut.shape == (windows or 32, window)
    if bos is not None:
        assert (cut[:, 0] == bos).all()
        cut = cut[:, 1:]
    assert (np.diff(cut, axis=1) == 1).all()
    gaps = cut[1:, 0] - cut[:-1, -1] - 1
    assert gaps.min() >= 0 and gaps.max() - gaps.min() <= 1
    assert cut[0, 0] == 1000 and cut[-1, -1] == 1000 + count - 1


def test_torch_backend_equals_transformers(tmp_path):
    import torch

    from tests.tiny_models import reference_model

    folder = save_tiny(tmp_path / "m", "qwen2")
    tokens = random_tokens(3, 20)
    with torch.no_grad():
        expected = reference_model(folder)(tokens).logits.numpy()
    backend = TorchBackend(folder)
    got = backend.logits_batch(tokens.numpy())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(backend.logits(tokens[1].numpy()), got[1], atol=1e-5)
    for bad, match in ((tokens[0].numpy(), "windows"), (tokens.numpy() + 500, "token ids"),
                       (np.zeros((1, 300), int), "context")):
        with pytest.raises(InputError, match=match):
            backend.logits_batch(bad)


def quantised(folder, tiny_source, drop=()):
    """A checkpoint of an HF model whose linears lie on q8_0 by plain rounding."""
    config = tiny_source.config
    spec = grid_spec("q8_0")

    def rounded(weight):
        blocks = weight.reshape(weight.shape[0], -1, 32)
        scales = (np.abs(blocks).max(-1) / 127).astype(np.float16)
        codes = np.clip(np.rint(blocks / scales.astype(np.float32)[..., None]) + 128, 0, 255).astype(np.uint8)
        return QuantizedTensor(spec, codes.reshape(weight.shape), scales)

    with CheckpointWriter(folder) as writer:
        for i in range(config.num_hidden_layers):
            layer = {f"layers.{i}.{key}": value.numpy() for key, value in tiny_source.layer(i).items()}
            writer.write_shard(f"layer{i}", {key: rounded(value) if value.ndim == 2 else value
                                             for key, value in layer.items() if key not in drop})
        rest = {"embed_tokens.weight": tiny_source.embedding().numpy(),
                "norm.weight": tiny_source.final_norm().numpy(),
                "lm_head.weight": rounded(tiny_source.lm_head().numpy())}
        writer.write_shard("rest", {key: value for key, value in rest.items() if key not in drop})
        writer.finish({"model": config.to_dict(), "rotation": {"rotation": "none", "applied": []}})
    return folder


def test_decoded_checkpoint(tmp_path):
    from optrot_edge.models import open_model

    source = open_model(save_tiny(tmp_path / "m", "qwen2_untied", tokenizer="qwen2"))
    folder = quantised(tmp_path / "ckpt", source)
    decoded = DecodedCheckpoint(folder)
    assert isinstance(decoded.config, ModelConfig) and decoded.config == source.config
    layer, original = decoded.layer(1), source.layer(1)
    assert layer.keys() == original.keys()
    for key in layer:
        error = (layer[key] - original[key]).abs().max() / original[key].abs().max()
        assert 0 < error < 1 / 127 if layer[key].ndim == 2 else error == 0
    assert (decoded.r3_block, decoded.r4_block) == (None, None)
    shutil.copytree(tmp_path / "m", folder / "tokenizer",
                    ignore=lambda _, names: [name for name in names if "token" not in name])
    text = read_text(__file__) * 3
    report = evaluate_package(folder, reference=tmp_path / "m", text=text, windows=4, window=64)
    assert report["runtime"].startswith("torch")
    assert 0 < report["kl_mean"] < 0.01
    tensors = [tensor for i in range(2) for tensor in source.layer(i).values()]
    floats = 512 * 128 + 128 + sum(tensor.numel() for tensor in tensors if tensor.ndim == 1)
    linears = 512 * 128 + sum(tensor.numel() for tensor in tensors if tensor.ndim == 2)
    assert bits_per_weight(folder) == pytest.approx((32 * floats + 8.5 * linears) / (floats + linears))
    assert report["prefill_tokens_per_s"] is None
    with pytest.raises(InputError, match="runs in torch only"):
        open_package(folder, "llama.cpp")


def test_bfloat16_takes_16_bits(model, tmp_path):
    types = dict.fromkeys(("type", "embedding_type", "head_type"), "bf16")
    folder = pipeline.quantize(model("llama"), tmp_path / "c", rotation="none", quantizer="rtn", calibration="none",
                               **types)
    pipeline.export(folder, tmp_path / "m.gguf")
    assert 16 < bits_per_weight(folder) < 17
    assert bits_per_weight(folder) == pytest.approx(bits_per_weight(tmp_path / "m.gguf"), rel=1e-3)


def test_damaged_checkpoint(tmp_path):
    from optrot_edge.models import open_model

    source = open_model(save_tiny(tmp_path / "m", "llama"))
    with pytest.raises(InputError, match="lm_head"):
        TorchBackend(quantised(tmp_path / "a", source, drop=("lm_head.weight",))).logits([1, 2])
    manifest = tmp_path / "a" / "optrot.json"
    data = json.loads(manifest.read_text())
    for change in ({"model": None}, {"model": {"family": "llama"}}, {"tensors": []}):
        manifest.write_text(json.dumps(data | change))
        with pytest.raises(InputError):
            DecodedCheckpoint(tmp_path / "a")
