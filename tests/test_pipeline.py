"""The whole road on tiny models: rotate, quantise, export, run in real llama.cpp."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import logits
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.exporters.gguf_models import Decoded, llama_logits
from tests.road import FAST
from tests.tiny_models import CASES, random_tokens

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BODIES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def length_of(case: str) -> int:
    """Tokens compared: llama.cpp is exact within a sliding window only."""
    return 8 if case == "mistral_window" else 24


def spread(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square difference in units of the expected logits' standard deviation."""
    difference = found - expected
    return np.abs(difference).max() / expected.std(), np.sqrt(np.square(difference).mean()) / expected.std()


def decoded_logits(path, tokens) -> np.ndarray:
    checkpoint = QuantizedCheckpoint(path)
    config = ModelConfig.from_dict(checkpoint.manifest["model"])
    return logits(Decoded(checkpoint, config), tokens)[0].numpy()


def original_logits(folder, tokens) -> np.ndarray:
    return logits(open_model(folder), tokens)[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_end_to_end(case, model, tmp_path, text):
    """Built-in calibration, OptRot, GPTQ; llama.cpp computes what the checkpoint's weights say.

    llama.cpp rounds activations to 8 bits per 32, which costs 1-2 % of the logits' spread here.
    """
    body, kl, tokens = BODIES[CASES.index(case) % 5], {}, random_tokens(1, length_of(case))
    rotation = tmp_path / "r.safetensors"
    pipeline.rotate(model(case), rotation, **FAST)
    for kind in {"q4_0", body, "q8_0"}:
        checkpoint, out = tmp_path / kind, tmp_path / f"{kind}.gguf"
        pipeline.quantize(model(case), checkpoint, type=kind, rotation=rotation,
                          calibration="builtin" if kind == body else text, **FAST)
        summary = pipeline.export(checkpoint, out)
        assert summary["file_type"] == f"MOSTLY_{kind.upper()}"
        largest, typical = spread(llama_logits(out, tokens[0].numpy()), decoded_logits(checkpoint, tokens))
        assert typical < 0.03 and largest < 0.2
        report = pipeline.evaluate(out, model(case), text=text, windows=4, window=length_of(case), speed=False)
        assert report["nonfinite"] == 0 and np.isfinite(report["kl_mean"])
        kl[kind] = report["kl_mean"]
    assert 0 < kl["q8_0"] < 0.2 * kl["q4_0"]
    assert kl["q8_0"] <= kl[body] <= 1.2 * kl["q4_0"]


@pytest.mark.parametrize("case", CASES)
def test_a_rotated_float_model_is_the_original_in_llama_cpp(case, model, tmp_path):
    """Read, fold, rotate, untie, write, permute, run: nothing on the road changes the function."""
    tokens = random_tokens(1, length_of(case))
    pipeline.export(model(case), tmp_path / "m.gguf", type="f32", head_type="f32", rotation="optrot",
                    checkpoint=tmp_path / "c", **FAST)
    rotation = QuantizedCheckpoint(tmp_path / "c").manifest["rotation"]
    assert rotation["rotation"] == "optrot" and rotation["applied"] == ["r1", "r2"]
    largest, _ = spread(llama_logits(tmp_path / "m.gguf", tokens[0].numpy()), original_logits(model(case), tokens))
    assert largest < 5e-5


def test_invariance_would_see_a_wrong_rotation(model, tmp_path):
    """The same comparison with one R2 block exchanged for another orthogonal matrix."""
    from optrot_edge.rotations.fuse import RotatedModel
    from optrot_edge.rotations.rotation import Rotation

    pipeline.rotate(model("llama"), tmp_path / "r.safetensors", rotation="hadamard")
    rotated = RotatedModel(open_model(model("llama")), Rotation.load(tmp_path / "r.safetensors"))
    tokens, expected = random_tokens(1, 24), original_logits(model("llama"), random_tokens(1, 24))
    assert spread(logits(rotated, tokens)[0].numpy(), expected)[0] < 2e-5
    inner, layer = rotated.layer, rotated.layer(0)
    layer["o_proj.weight"] = layer["o_proj.weight"].roll(1, 1)
    rotated.layer = lambda index, dtype=torch.float32: layer if index == 0 else inner(index, dtype)
    assert spread(logits(rotated, tokens)[0].numpy(), expected)[0] > 0.1


def test_a_saved_rotation_is_reused(model, tmp_path, text):
    """Learning inside `quantize` and learning before it give the same checkpoint."""
    recipe = {**FAST, "rotation": "optrot", "calibration": text, "seed": 5}
    saved = tmp_path / "r.safetensors"
    pipeline.rotate(model("smollm2"), saved, **recipe)
    pipeline.quantize(model("smollm2"), tmp_path / "direct", **recipe)
    pipeline.quantize(model("smollm2"), tmp_path / "reused", **{**recipe, "rotation": str(saved)})
    direct, reused = QuantizedCheckpoint(tmp_path / "direct"), QuantizedCheckpoint(tmp_path / "reused")
    assert direct.names == reused.names
    for name in direct.names:
        np.testing.assert_array_equal(direct.weights(name), reused.weights(name))
    assert reused.manifest["rotation"] == direct.manifest["rotation"]
    assert reused.manifest["recipe"]["rotation"] == str(saved)


def test_a_rotation_of_another_model_is_refused(model, tmp_path, text):
    pipeline.rotate(model("smollm2"), tmp_path / "r.safetensors", rotation="hadamard")
    with pytest.raises(InputError, match="rotation R1 has shape .*made for another model"):
        pipeline.quantize(model("tinyllama"), tmp_path / "c", rotation=tmp_path / "r.safetensors",
                          **{**FAST, "calibration": text})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.safetensors"]


def test_rtn_without_calibration(model, tmp_path):
    """No text, no Hessian; and weights are plainly rounded: each within half a step of the original."""
    out = pipeline.quantize(model("llama"), tmp_path / "c", type="q8_0", rotation="none", quantizer="rtn",
                            calibration="none")
    checkpoint, source = QuantizedCheckpoint(out), open_model(model("llama"))
    assert checkpoint.manifest["calibration_sha256"] is None
    tensor = checkpoint.get("layers.1.up_proj.weight")
    steps = np.abs(np.repeat(tensor.scales.astype(np.float32), 32, axis=1))
    error = np.abs(tensor.decode() - source.layer(1)["up_proj.weight"].numpy())
    inside = (tensor.codes > 0) & (tensor.codes < 255)
    assert (error <= 0.5001 * steps)[inside].all() and inside.mean() > 0.95


def test_gptq_without_calibration_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="GPTQ needs calibration text"):
        pipeline.quantize(model("llama"), tmp_path / "c", calibration="none")


def test_seeds(model, tmp_path, text):
    """The same seed gives the same file to the byte; another seed another file."""
    files = [tmp_path / f"{i}.gguf" for i in range(3)]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        pipeline.export(model("qwen2"), path, calibration=text, seed=seed, **FAST)
    first, again, other = (path.read_bytes() for path in files)
    assert first == again and first != other


def test_integer_grids_stay_out_of_gguf(model, tmp_path, text):
    recipe = {**FAST, "calibration": text, "type": "int4-g32-sym"}
    checkpoint = pipeline.quantize(model("llama"), tmp_path / "c", **recipe)
    tokens = random_tokens(1, 24)
    with TorchBackend(checkpoint) as backend:
        found = backend.logits(tokens[0].numpy())
    assert spread(found, decoded_logits(checkpoint, tokens))[0] < 1e-5
    with pytest.raises(InputError, match=r"int4-g32-sym.*q4_0, q4_1"):
        pipeline.export(checkpoint, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="--type int4-g32-sym: GGUF stores"):
        pipeline.export(model("llama"), tmp_path / "m.gguf", **recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_r4_and_r3(model, tmp_path):
    """In torch the float logits are the original's; GGUF refuses R3."""
    tokens, recipe = random_tokens(1, 24), {"rotation": "hadamard", "rotate": "r1,r2,r3,r4", "r4_block": 32}
    checkpoint = pipeline.quantize(model("llama"), tmp_path / "c", type="f32", head_type="f32", calibration="none",
                                   quantizer="rtn", **recipe)
    rotation = QuantizedCheckpoint(checkpoint).manifest["rotation"]
    assert (rotation["applied"], rotation["r3_block"], rotation["r4_block"]) == (["r1", "r2", "r3", "r4"], 16, 32)
    with TorchBackend(checkpoint) as backend:
        found = backend.logits(tokens[0].numpy())
    expected = original_logits(model("llama"), tokens)
    assert spread(found, expected)[0] < 2e-5
    assert spread(decoded_logits(checkpoint, tokens), expected)[0] > 0.1  # without the online half
    with pytest.raises(InputError, match="R3"):
        pipeline.export(checkpoint, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="--rotate r3"):
        pipeline.export(model("llama"), tmp_path / "m.gguf", **{**recipe, "rotate": "r1,r3"})
    pipeline.rotate(model("llama"), tmp_path / "r.safetensors", **recipe)
    with pytest.raises(InputError, match="holds r1,r2,r3,r4; pass --rotate r1,r2,r3,r4"):
        pipeline.export(model("llama"), tmp_path / "m.gguf", rotation=tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="r3.*leave r3 out for GGUF"):
        pipeline.export(model("llama"), tmp_path / "m.gguf", rotation=tmp_path / "r.safetensors", rotate="r1,r2,r3,r4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "r.safetensors"]


def test_r4_with_gptq_is_evaluated_in_torch(model, tmp_path, text):
    checkpoint = pipeline.quantize(model("llama"), tmp_path / "c", type="q8_0", rotation="optrot",
                                   rotate="r1,r2,r4", r4_block=32, calibration=text, **FAST)
    report = pipeline.evaluate(checkpoint, model("llama"), text=text, windows=2, window=32)
    assert report["runtime"].startswith("torch") and 0 < report["kl_mean"] < 0.01


def test_manifest(model, tmp_path, text):
    folder = model("smollm2")
    path = pipeline.quantize(folder, tmp_path / "c", type="q4_1", embedding_type="q5_0", seed=3, calibration=text,
                             rotation="optrot", **FAST)
    checkpoint = QuantizedCheckpoint(path)
    manifest = checkpoint.manifest
    expected = {"type": "q4_1", "embedding_type": "q5_0", "head_type": None, "rotation": "optrot", "rotate": "r1,r2",
                "quantizer": "gptq", "calibration": text, "seed": 3, "device": pipeline.resolve_device("auto"), **FAST}
    assert manifest["recipe"] | expected == manifest["recipe"] and manifest["seed"] == 3
    assert manifest["calibration_sha256"] == hashlib.sha256(Path(text).read_bytes()).hexdigest()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest["inputs"].keys()
    for name, digest in manifest["inputs"].items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert {"python", "optrot-edge", "numpy", "gguf", "safetensors"} <= manifest["versions"].keys()
    assert manifest["model"]["tie_word_embeddings"] is False  # R1 and the final norm's gain untie it
    assert manifest["rotation"]["recipe"]["loss"] < manifest["rotation"]["recipe"]["loss_start"]
    linears = {f"layers.{i}.{name}" for i in range(2) for name in LINEARS}
    assert manifest["errors"].keys() == linears | {"embed_tokens", "lm_head"}
    for name in linears:
        report = manifest["errors"][name]
        assert 10 < report["snr_db"] < 40 and 0 < report["relative_mse"] < 0.1 and report["damp_escalations"] == 0
    types = {name: entry.get("grid") for name, entry in manifest["tensors"].items()}
    assert types["embed_tokens.weight"] == "q5_0" and types["lm_head.weight"] == "q8_0"
    assert {types[f"{name}.weight"] for name in linears} == {"q4_1"} and types["norm.weight"] is None
    assert (path / "tokenizer" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_from_gguf_to_gguf(model, tmp_path, text):
    """A GGUF goes the same road; its vocabulary and chat template arrive unchanged."""
    import gguf

    pipeline.export(model("smollm2"), tmp_path / "f.gguf", type="f32", head_type="f32", rotation="none",
                    quantizer="rtn", calibration="none")
    recipe = {**FAST, "calibration": text, "type": "q8_0"}
    pipeline.export(tmp_path / "f.gguf", tmp_path / "q.gguf", **recipe)
    pipeline.export(model("smollm2"), tmp_path / "direct.gguf", **recipe)
    before, after = (gguf.GGUFReader(tmp_path / f"{name}.gguf").fields for name in "fq")
    keys = {key for key in before if key.startswith("tokenizer.")}
    assert "tokenizer.chat_template" in keys and keys == {key for key in after if key.startswith("tokenizer.")}
    assert all(before[key].contents() == after[key].contents() for key in keys)
    tokens = random_tokens(1, 24)[0].numpy()
    direct, through = llama_logits(tmp_path / "direct.gguf", tokens), llama_logits(tmp_path / "q.gguf", tokens)
    assert spread(through, direct)[0] < 1e-3


def test_a_tokenizer_that_gguf_cannot_hold_is_refused_before_the_work(model, tmp_path):
    folder = shutil.copytree(model("llama"), tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="neither vocab.gguf nor tokenizer.json .*pass --vocab-from"):
        pipeline.export(folder, tmp_path / "m.gguf", quantizer="rtn", calibration="none", rotation="optrot",
                        progress=lambda *_: pytest.fail("work had begun"))
    pipeline.export(model("llama"), tmp_path / "v.gguf", quantizer="rtn", calibration="none", rotation="none")
    pipeline.export(folder, tmp_path / "m.gguf", quantizer="rtn", calibration="none", rotation="none",
                    vocab_from=tmp_path / "v.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "v.gguf").read_bytes()


def test_paths_may_be_path_objects(model, tmp_path, text):
    pipeline.rotate(model("llama"), tmp_path / "r.safetensors", rotation="hadamard")
    fields = {**FAST, "calibration": Path(text)}
    path = pipeline.quantize(model("llama"), tmp_path / "c", rotation=tmp_path / "r.safetensors", **fields)
    assert QuantizedCheckpoint(path).manifest["recipe"]["calibration"] == text


@pytest.mark.parametrize("stage", ["learn rotation", "quantise layers", "write and verify"])
@pytest.mark.parametrize("last", [False, True])
def test_an_interrupt_at_any_stage(stage, last, model, tmp_path, text):
    """Nothing is left before anything is finished; later the work folder is, with which the same call goes on."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF of mine")

    def interrupt(name, done, total, note):
        if name == stage and done >= (total if last else 1):
            assert len(list(tmp_path.iterdir())) > 1  # something temporary is there
            raise KeyboardInterrupt

    fields = {"overwrite": True, "calibration": text, "rotation": "optrot", **FAST}
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(model("llama"), tmp_path / "m.gguf", progress=interrupt, **fields)
    kept = [] if stage == "learn rotation" else ["m.gguf.checkpoint.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", *kept]
    assert (tmp_path / "m.gguf").read_bytes() == b"GGUF of mine"
    pipeline.export(model("llama"), tmp_path / "m.gguf", **fields)
    pipeline.export(model("llama"), tmp_path / "undisturbed.gguf", **fields)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "undisturbed.gguf"]
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "undisturbed.gguf").read_bytes()
