"""MLX packages in the real mlx-lm: loaded as its own, weight for weight and logit for logit."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.exporters import folder_package
from optrot_edge.exporters.mlx import export_mlx
from optrot_edge.models.family import get_family
from optrot_edge.runtime.mlx import MlxBackend
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.cli_runner import child, left, refused
from tests.exporters.folder_checks import nothing_is_left_of_a_failure, only_packages_are_replaced
from tests.road import write_text
from tests.test_pipeline import decoded_logits, length_of, original_logits, spread
from tests.tiny_models import CASES, random_tokens

mx = pytest.importorskip("mlx.core", reason="MLX is made for macOS and Linux")
RTN = {"quantizer": "rtn", "calibration": "none", "rotation": "none", "format": "mlx"}


@pytest.fixture
def checkpoint(model, tmp_path):
    """A checkpoint of three grids, in float32."""
    return pipeline.quantize(model("llama"), tmp_path / "c", group_size=32, head_type="6bit", **RTN,
                             tensor_type=["down_proj=8bit", "layers.0.v_proj=f32"])


def mlx_logits(folder, tokens) -> np.ndarray:
    """Logits of one sequence in mlx-lm."""
    from mlx_lm import load

    with mx.stream(mx.cpu):
        loaded, _ = load(str(folder))
        return np.array(loaded(mx.array(tokens.numpy()))[0].astype(mx.float32))


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_computes_what_the_checkpoint_says(case, model, tmp_path):
    text = write_text(tmp_path / "text.txt")
    checkpoint = pipeline.quantize(model(case), tmp_path / "c", format="mlx", group_size=32, rotation="hadamard",
                                   rotate="r2", calibration=str(text), nsamples=4, seqlen=32)
    pipeline.export(checkpoint, tmp_path / "package")
    tokens = random_tokens(1, length_of(case))
    found = mlx_logits(tmp_path / "package", tokens)
    worst, _ = spread(found, decoded_logits(checkpoint, tokens))
    assert worst < 1e-3
    _, lost = spread(found, original_logits(model(case), tokens))
    assert 0.01 < lost < 0.6  # quantised, and still the model


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_arrays_are_the_codes(bits, dtype, model, tmp_path):
    """Every array that MLX reads from the files decodes to the checkpoint's weights, to the rounding of the dtype."""
    checkpoint = pipeline.quantize(model("smollm2"), tmp_path / "c", bits=bits, group_size=32, dtype=dtype, **RTN)
    summary = pipeline.export(checkpoint, tmp_path / "package")
    opened, config = QuantizedCheckpoint(checkpoint), json.loads((tmp_path / "package/config.json").read_text())
    assert config["quantization"] == {"bits": bits, "group_size": 32, "mode": "affine"} == config["quantization_config"]
    assert summary["dtype"] == dtype == config["torch_dtype"]
    with mx.stream(mx.cpu):
        arrays, worst = mx.load(str(tmp_path / "package/model.safetensors")), 0.0
        for name in opened.names:
            hf = get_family("llama").hf_name(name)
            found = arrays[hf]
            if found.dtype == mx.uint32:
                base = hf.removesuffix(".weight")
                found = mx.dequantize(found, arrays[f"{base}.scales"], arrays[f"{base}.biases"], 32, bits)
            assert found.dtype == getattr(mx, dtype)
            expected = opened.weights(name)
            worst = max(worst, np.abs(np.array(found.astype(mx.float32)) - expected).max() / np.abs(expected).max())
    assert worst <= {"float32": 0, "float16": 2**-9, "bfloat16": 2**-6}[dtype]


def test_modules_of_other_grids_are_listed(checkpoint, tmp_path):
    summary = pipeline.export(checkpoint, tmp_path / "package")
    grid = json.loads((tmp_path / "package/config.json").read_text())["quantization"]
    assert (grid.pop("bits"), grid.pop("group_size"), grid.pop("mode")) == (4, 32, "affine")
    eight = {"bits": 8, "group_size": 32, "mode": "affine"}
    assert grid == {"lm_head": {**eight, "bits": 6}, "model.layers.0.mlp.down_proj": eight,
                    "model.layers.1.mlp.down_proj": eight, "model.layers.0.self_attn.v_proj": False}
    tokens = random_tokens(1, 24)
    worst, _ = spread(mlx_logits(tmp_path / "package", tokens), decoded_logits(checkpoint, tokens))
    assert worst < 1e-3
    assert summary["weights"] > 0 and 4 < summary["bits_per_weight"] < 12
    assert "--trust-remote-code" not in (tmp_path / "package/README.md").read_text()


def test_shards_and_their_index(checkpoint, tmp_path, monkeypatch):
    pipeline.export(checkpoint, tmp_path / "whole")
    monkeypatch.setattr(folder_package, "SHARD_BYTES", 40_000)
    pipeline.export(checkpoint, tmp_path / "package")
    files = sorted(path.name for path in (tmp_path / "package").glob("*.safetensors"))
    index = json.loads((tmp_path / "package/model.safetensors.index.json").read_text())
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    stored = {name: file for file in files for name in mx.load(str(tmp_path / "package" / file))}
    assert stored == index["weight_map"]
    tokens = random_tokens(1, 24)
    assert np.array_equal(mlx_logits(tmp_path / "package", tokens), mlx_logits(tmp_path / "whole", tokens))


def test_a_rotated_tied_model_is_untied(model, tmp_path):
    pipeline.export(model("smollm2"), tmp_path / "package", format="mlx", group_size=32, rotation="hadamard",
                    quantizer="rtn", calibration="none")
    config = json.loads((tmp_path / "package/config.json").read_text())
    assert config["tie_word_embeddings"] is False and config["optrot"]["applied"] == ["r1", "r2"]
    tokens = random_tokens(1, 24)
    _, lost = spread(mlx_logits(tmp_path / "package", tokens), original_logits(model("smollm2"), tokens))
    assert 0.01 < lost < 0.6


@pytest.mark.parametrize("rotate", ["r1,r2,r4", "r1,r2,r3,r4", "r3"])
@pytest.mark.parametrize("case", ["llama", "smollm2", "qwen2", "qwen3_tied"])
def test_online_rotations_come_with_a_model_file(case, rotate, model, tmp_path):
    """What needs R3 or R4 runs when trusted, is refused otherwise, and keeps a tied head tied."""
    options = RTN | {"rotation": "hadamard", "rotate": rotate, "r4_block": 32}
    checkpoint = pipeline.quantize(model(case), tmp_path / "c", group_size=32, bits=8, **options)
    pipeline.export(checkpoint, tmp_path / "package")
    config, tied = json.loads((tmp_path / "package/config.json").read_text()), case != "llama"
    assert config["model_file"] == "optrot_model.py" and config["tie_word_embeddings"] == tied
    assert config["optrot"]["head_mix"] == (tied and "r1" in rotate)
    assert "--trust-remote-code" in (tmp_path / "package/README.md").read_text()
    tokens = random_tokens(1, 24)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        mlx_logits(tmp_path / "package", tokens)
    with MlxBackend(tmp_path / "package", trust_remote_code=True) as backend:
        found = backend.logits(tokens[0].numpy())
    worst, _ = spread(found, TorchBackend(checkpoint).logits(tokens[0].numpy()))
    assert worst < 1e-3
    _, lost = spread(found, original_logits(model(case), tokens))
    assert lost < 0.1  # 8 bits


def test_the_package_is_evaluated_in_mlx(model, tmp_path):
    text = write_text(tmp_path / "text.txt")
    pipeline.export(model("qwen3"), tmp_path / "package", format="mlx", bits=8, group_size=32, rotation="hadamard",
                    quantizer="rtn", calibration="none")
    report = pipeline.evaluate(tmp_path / "package", model("qwen3"), text=str(text), windows=4, window=32, speed=False)
    assert report["runtime"].startswith("mlx") and 0 < report["kl_mean"] < 0.01 and report["top1"] > 0.9
    assert report["bits_per_weight"] == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("options, says", [
    (["--group-size", "32", "--rotation", "hadamard", "--rotate", "r4"],
     "R4 block 256 must be a power of two that divides 160"),
    (["--bits", "7"], "--bits 7: MLX stores 2, 3, 4, 5, 6, 8"),
    (["--group-size", "48"], "--group-size 48: MLX stores groups of 32, 64, 128"),
    (["--group-size", "64"], "rows of 96 weights do not divide into mlx-4bit-g64-f32's groups of 64"),
    (["--dtype", "float64"], "--dtype float64: use float16, bfloat16, float32"),
    (["--type", "q4_0"], "q4_0: MLX stores 2bit"),
    (["--head-type", "bf16"], "bf16: MLX packages have one dtype, here float32"),
    (["--bits", "4", "--target-bpw", "5"], "--bits says what --type, --target-bpw"),
    (["--vocab-from", "x.gguf"], "--vocab-from is for GGUF"),
    (["--format", "tflite"], "--format tflite: use gguf, mlx, onnx or gptq"),
    (["--format", "gguf", "--bits", "4"], "--bits, --group-size and --dtype are for --format mlx, onnx and gptq"),
])
def test_bad_input_is_refused(options, says, model, tmp_path, capfd):
    refused(capfd, "export", model("llama"), "--format", "mlx", "--out", tmp_path / "package", *options, says=says)
    assert left(tmp_path) == []


def test_gguf_checkpoints_are_refused(model, tmp_path, capfd):
    pipeline.quantize(model("llama"), tmp_path / "c", **RTN | {"format": "gguf"})
    refused(capfd, "export", tmp_path / "c", "--format", "mlx", "--out", tmp_path / "package",
            says="is on grid q4_0, which MLX cannot store")
    pipeline.quantize(model("llama"), tmp_path / "m", group_size=32, **RTN)
    refused(capfd, "export", tmp_path / "m", "--format", "gguf", "--out", tmp_path / "m.gguf",
            says="mlx-4bit-g32-f32")
    assert left(tmp_path) == ["c", "m"]


def test_only_packages_are_replaced(checkpoint, tmp_path, capfd):
    only_packages_are_replaced(checkpoint, tmp_path, capfd, "mlx")


def test_nothing_is_left_of_a_failure(checkpoint, tmp_path):
    nothing_is_left_of_a_failure(checkpoint, tmp_path, export_mlx)


def test_damage_is_seen_when_read_back(checkpoint, tmp_path, monkeypatch):
    def damaged(path, entries, arrays, metadata):
        arrays = [(name, array ^ 1 if name == "lm_head.weight" else array) for name, array in arrays]
        write(path, entries, arrays, metadata)

    write = folder_package.write_safetensors
    monkeypatch.setattr(folder_package, "write_safetensors", damaged)
    with pytest.raises(RuntimeError, match="lm_head read back differently"):
        export_mlx(QuantizedCheckpoint(checkpoint), tmp_path / "package")
    assert left(tmp_path) == ["c"]


def test_a_size_is_met(model, tmp_path):
    """The whole package is at most as large as asked for, and little smaller."""
    text = write_text(tmp_path / "text.txt")
    size = 200_000
    summary = pipeline.export(model("llama"), tmp_path / "package", format="mlx", rotation="none",
                              calibration=str(text), nsamples=8, seqlen=32, target_size=size)
    assert 0.9 * size < summary["bytes"] <= size
    grid = json.loads((tmp_path / "package/config.json").read_text())["quantization"]
    assert len({value["bits"] for value in grid.values() if isinstance(value, dict)} | {grid["bits"]}) > 1


def test_scales_learn_by_distillation(model, tmp_path):
    """`--distill` moves MLX's scales and biases, not its codes, and what it keeps is better on held-out text."""
    text = write_text(tmp_path / "text.txt", topics=6)
    folder = pipeline.quantize(model("smollm2"), tmp_path / "c", format="mlx", bits=3, group_size=32, rotation="none",
                               calibration=str(text), nsamples=16, seqlen=32, distill=2)
    report = QuantizedCheckpoint(folder).manifest["distill"]
    assert report["kept"] and report["kl_after"] < report["kl_before"]
    pipeline.export(folder, tmp_path / "package")
    tokens = random_tokens(1, 24)
    worst, _ = spread(mlx_logits(tmp_path / "package", tokens), decoded_logits(folder, tokens))
    assert worst < 1e-3


def test_the_plan_is_what_is_written(model, tmp_path):
    options = {"format": "mlx", "group_size": 32, "rotation": "none", "quantizer": "rtn", "calibration": "none"}
    planned = pipeline.plan(model("qwen2"), packaged=True, **options)
    pipeline.quantize(model("qwen2"), tmp_path / "c", **options)
    again = pipeline.plan(tmp_path / "c", packaged=True)
    summary = pipeline.export(tmp_path / "c", tmp_path / "package")
    assert planned["bytes"] == again["bytes"] == round(summary["bits_per_weight"] * summary["weights"] / 8)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen2", "qwen3"])
def test_mlx_lm_measures_perplexity(case, model, tmp_path):
    """mlx-lm's own perplexity of a package is this project's."""
    from mlx_lm.perplexity import eval_ppl
    from mlx_lm.utils import load_model

    pipeline.export(model(case), tmp_path / "package", bits=6, group_size=32, **RTN)
    tokens = random_tokens(3, 24)
    with mx.stream(mx.cpu):
        found, _ = eval_ppl(load_model(tmp_path / "package")[0], mx.array(tokens.numpy()))
    logits = np.stack([mlx_logits(tmp_path / "package", row[None]) for row in tokens])[:, :-1].astype(np.float64)
    peak = logits.max(-1, keepdims=True)
    surprise = np.log(np.exp(logits - peak).sum(-1)) + peak[..., 0] - np.take_along_axis(
        logits, tokens[:, 1:, None].numpy(), -1)[..., 0]
    assert found == pytest.approx(np.exp(surprise.mean()), rel=1e-4)


@pytest.mark.slow
def test_mlx_lm_serves(model, tmp_path):
    """`mlx_lm.server` answers a chat with a package."""
    pipeline.export(model("smollm2"), tmp_path / "package", group_size=32, **RTN)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "mlx_lm", "server", "--model", str(tmp_path / "package"), "--port",
                               str(port)], stderr=subprocess.PIPE, text=True)
    try:
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body,
                                         {"Content-Type": "application/json"})
        for _ in range(240):
            with contextlib.suppress(ConnectionError, urllib.error.URLError):
                answer = json.load(urllib.request.urlopen(request, timeout=120))
                break
            assert server.poll() is None, server.stderr.read()
            time.sleep(0.5)
        assert answer["usage"]["completion_tokens"] == 4 and isinstance(answer["choices"][0]["message"]["content"], str)
    finally:
        server.kill()
        server.communicate()


@pytest.mark.slow
def test_mlx_lm_generates(model, tmp_path):
    """The command that a user types, in a process of its own."""
    made = child("export", model("smollm2"), "--format", "mlx", "--group-size", "32", "--rotation", "none",
                 "--quantizer", "rtn", "--calibration", "none", "--out", tmp_path / "package")
    assert made.returncode == 0, made.stderr
    done = subprocess.run([sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "package"), "--prompt",
                           "hello", "--max-tokens", "4"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "Generation: 4 tokens" in done.stdout, done.stderr
