"""Distillation: right gradients, the same codes, never a worse checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from optrot_edge import pipeline
from optrot_edge.checkpoint import CheckpointWriter, QuantizedCheckpoint, QuantizedTensor
from optrot_edge.errors import InputError
from optrot_edge.gridspec import decode_scales
from optrot_edge.inputs import CalibrationInputs, calibration_windows
from optrot_edge.models import forward, open_model
from optrot_edge.quantize.calibration import load_text
from optrot_edge.quantize.distill import DistillOptions, Student, _Distillation, distill
from optrot_edge.quantize.free_scales import FreeTensor
from optrot_edge.quantize.grids import Grid
from optrot_edge.recipe import Recipe
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.runtime.text import open_tokenizer
from tests.exporters.gguf_models import llama_logits, write_checkpoint
from tests.road import FAST, save_model
from tests.test_pipeline import decoded_logits, spread
from tests.tiny_models import random_tokens

GRIDS = ["q4_0", "q4_1", "q5_1", "int3-g64-zero", "int4-g64-min", "mlx-4bit-g64-bf16", "iq4_nl", "iq4_xs", "q2_k",
         "q3_k", "q4_k", "q6_k"]
RECIPE = {**FAST, "rotation": "none", "nsamples": 16}


def quantised(name: str, seed: int = 0) -> QuantizedTensor:
    grid, weight = Grid(name), torch.randn(6, 512, generator=torch.Generator().manual_seed(seed))
    params = grid.fit(weight)
    return grid.pack(grid.round(weight, params), params)


def decode(tensor: QuantizedTensor, scales: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The weights of a stored tensor with other scales and float offsets, float64, as the formats' documents say."""
    spec, rows = tensor.spec, len(tensor.codes)
    codes = torch.from_numpy(tensor.codes.astype(np.float64)).view(rows, -1, spec.group_size)
    repeats = spec.block_size // spec.group_size
    if spec.subscales:
        scales = scales.repeat_interleave(repeats, 1) * torch.from_numpy(tensor.subscales.astype(np.float64))
        if offsets is not None:
            offsets = -offsets.repeat_interleave(repeats, 1) * torch.from_numpy(tensor.suboffsets.astype(np.float64))
    if spec.codebook:
        levels = torch.tensor(spec.codebook, dtype=torch.float64)[codes.long()]
    else:
        levels = codes - {"symmetric": spec.levels // 2}.get(spec.kind, 0)
    if spec.kind == "zero":
        levels = levels - torch.from_numpy(tensor.offsets.astype(np.float64))[..., None]
    weights = levels * scales[..., None]
    return (weights if offsets is None else weights + offsets[..., None]).view(rows, -1)


@pytest.mark.parametrize("name", GRIDS)
def test_gradients_are_those_of_autograd(name):
    tensor = quantised(name)
    free, spec = FreeTensor("w", tensor), tensor.spec
    floats = lambda part: torch.from_numpy(decode_scales(part, spec.scale_dtype).astype(np.float64))  # noqa: E731
    scales, offsets = floats(tensor.scales), floats(tensor.offsets) if spec.kind == "min" else None
    moves = {part: torch.zeros_like(scales, requires_grad=True) for part in free.no_moves()}
    assert set(moves) == ({"scales", "offsets"} if spec.kind == "min" else {"scales"})
    moved = None if offsets is None else offsets + scales * moves["offsets"]
    weights = decode(tensor, scales * (1 + moves["scales"]), moved)
    assert np.allclose(weights.detach(), tensor.decode(), rtol=1e-5, atol=1e-6)
    of_weights = torch.randn(weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights.backward(of_weights)
    found = free.gradient(of_weights)
    assert found.keys() == moves.keys()
    for part, gradient in found.items():
        assert torch.allclose(gradient, moves[part].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*GRIDS, "mxfp4"])
def test_moved_weights_are_the_stored_ones(name):
    """Codes, integers and dtypes stay; what is stored decodes to the weights that were trained with."""
    tensor = quantised(name)
    free = FreeTensor("w", tensor)
    moves = {part: 0.05 * torch.randn(theta.shape) for part, theta in free.no_moves().items()}
    assert bool(moves) == (name != "mxfp4")
    stored = free.stored(moves)
    assert np.array_equal(stored.decode(), free.weights(moves).numpy())
    assert np.array_equal(free.stored(free.no_moves()).decode(), tensor.decode())
    for part, array in stored.parts().items():
        before = tensor.parts()[part]
        assert array.dtype == before.dtype
        is_moved = part == "scales" and moves or part == "mins"
        assert np.array_equal(array, before) != bool(is_moved)


def test_gains_and_biases_move():
    gain, bias = np.float32([2, 0, -1]), np.float32([3, 0, 4, 0])
    assert np.array_equal(FreeTensor("attn_norm.weight", gain).stored({"values": torch.full((3,), 0.5)}), gain * 1.5)
    free = FreeTensor("q_proj.bias", bias)  # root mean square 2.5
    assert np.array_equal(free.stored({"values": torch.tensor([0, 1.0, 0, 0])}), np.float32([3, 2.5, 4, 0]))
    assert np.array_equal(free.gradient(torch.ones(4))["values"], np.full(4, 2.5, np.float32))
    assert not FreeTensor("q_proj.weight", np.ones((2, 2), np.float16)).no_moves()


@dataclass
class Unfinished:
    """What `distill` asks of a writer, over a finished checkpoint."""

    work: object
    tensors: dict


@pytest.mark.parametrize(("case", "body"), [("llama_bias", "q4_1"), ("qwen3", "q4_0"), ("qwen2_untied", "q8_0"),
                                            ("mistral_window", "q5_1"), ("wide", "q4_k")])
def test_streamed_gradients_are_those_of_the_whole_graph(case, body, tmp_path):
    checkpoint = write_checkpoint(tmp_path, case, body)
    source, tokens = open_model(tmp_path / "hf"), random_tokens(5, 12)
    run = _Distillation(source, Student(checkpoint), tokens, 1, DistillOptions(), dtype=torch.float64)
    windows = torch.tensor([2, 0, 3])
    found = run.gradients(windows)
    kl, gradients = next(found), dict(found)

    whole = DecodedCheckpoint(checkpoint)
    config, rope = whole.config, forward.rope_tables(whole.config, 12, dtype=torch.float64)
    leaves = {name: torch.from_numpy(checkpoint.weights(name)).double().requires_grad_() for name in checkpoint.names}
    x = F.embedding(tokens[windows], leaves["embed_tokens.weight"].detach())
    for index in range(config.num_hidden_layers):
        prefix = f"layers.{index}."
        layer = {name.removeprefix(prefix): leaf for name, leaf in leaves.items() if name.startswith(prefix)}
        x = forward.decoder_layer(x, layer, config, rope)
    head = leaves.get("lm_head.weight", leaves["embed_tokens.weight"]).detach()
    mine = F.linear(forward.rms_norm(x, leaves["norm.weight"], config.rms_norm_eps), head).log_softmax(-1)
    wanted = forward.logits(source, tokens[windows], dtype=torch.float64).log_softmax(-1)
    expected = F.kl_div(mine, wanted, log_target=True, reduction="sum") / tokens[windows].numel()
    expected.backward()
    assert kl == pytest.approx(float(expected.detach()), rel=1e-9)
    assert set(gradients) == set(checkpoint.names) - {"embed_tokens.weight", "lm_head.weight"}
    for name, gradient in gradients.items():
        for part, oracle in FreeTensor(name, checkpoint.get(name)).gradient(leaves[name].grad).items():
            assert torch.allclose(gradient[part], oracle, rtol=1e-7, atol=1e-12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model", "smollm2")


def hashes(folder) -> dict:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("body", ["q4_0", "q4_1", "int4-g32-zero", "mxfp4"])
def test_only_scales_change_and_held_out_kl_falls(body, model, tmp_path, text):
    fields = {**RECIPE, "type": body, "calibration": text}
    paths = [pipeline.quantize(model, tmp_path / f"{epochs}", distill=epochs, **fields) for epochs in (0, 3)]
    plain, better = (QuantizedCheckpoint(path) for path in paths)
    assert plain.names == better.names and plain.manifest["tensors"] == better.manifest["tensors"]
    assert sorted(path.name for path in paths[0].iterdir()) == sorted(path.name for path in paths[1].iterdir())
    report = better.manifest["distill"]
    for name in plain.names:
        old, new = plain.get(name), better.get(name)
        if isinstance(old, QuantizedTensor):
            assert np.array_equal(old.codes, new.codes)
            assert np.array_equal(old.scales, new.scales) == (body == "mxfp4" or name == "embed_tokens.weight")
        else:
            assert old.dtype == new.dtype and not np.array_equal(old, new)
    assert "distill" not in plain.manifest
    assert report["kept"] and report["kl_after"] == min(report["kl_epochs"]) < report["kl_before"]
    for checkpoint, said in ((plain, report["kl_before"]), (better, report["kl_after"])):
        assert _held_out_kl(model, checkpoint, fields) == pytest.approx(said, rel=1e-4)


def _held_out_kl(model, checkpoint, fields) -> float:
    source = open_model(model)
    tokens = calibration_windows(source, Recipe(**fields, distill=1))[0][-2:]
    want, got = (forward.logits(m, tokens).log_softmax(-1) for m in (source, DecodedCheckpoint(checkpoint)))
    return float(F.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean())


def test_distillation_takes_fresh_windows(model, text):
    """Others than are calibrated and judged on, which stay the same; as many as the text has."""
    source, fields = open_model(model), {**RECIPE, "calibration": text}
    plain, fresh = (CalibrationInputs(source, Recipe(**fields, distill=epochs), "cpu", held_out=2)
                    for epochs in (0, 1))
    assert torch.equal(plain.tokens, fresh.tokens) and torch.equal(plain.held_out, fresh.held_out)
    assert len(plain.fresh) == 0 and len(fresh.fresh) == 16
    windows = {tuple(window.tolist()) for part in (fresh.tokens, fresh.held_out, fresh.fresh) for window in part}
    assert len(windows) == 34
    tokenizer = open_tokenizer(model)
    slots = len(tokenizer.tokenize(load_text(text))) // fields["seqlen"]
    tokenizer.close()
    most = slots * 8 // 9
    assert len(calibration_windows(source, Recipe(**{**fields, "nsamples": most}, distill=1))[0]) == slots
    with pytest.raises(InputError, match="--distill learns from windows that were not calibrated on"):
        calibration_windows(source, Recipe(**{**fields, "nsamples": most + 1}, distill=1))


def test_the_same_bytes_twice(model, tmp_path, text):
    fields = {**RECIPE, "type": "q4_1", "calibration": text, "distill": 2}
    first, second = (pipeline.quantize(model, tmp_path / name, **fields) for name in "ab")
    assert hashes(first) == hashes(second)


@pytest.mark.parametrize("rate", [3.0, 1e30])
def test_nothing_is_kept_when_kl_does_not_fall(rate, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", "q4_0")
    before, writer = hashes(checkpoint.path), Unfinished(checkpoint.path, checkpoint.manifest["tensors"])
    report = distill(open_model(tmp_path / "hf"), writer, checkpoint.manifest, random_tokens(6, 16), 2,
                     DistillOptions(epochs=2, learning_rate=rate))
    assert not report["kept"] and report["kl_after"] == report["kl_before"]
    assert all(kl is None or kl >= report["kl_before"] for kl in report["kl_epochs"])
    assert (None in report["kl_epochs"]) == (rate > 1e9)
    assert hashes(checkpoint.path) == before
    assert not list(checkpoint.path.glob("distilled*"))


@pytest.mark.parametrize(("case", "body"), [("smollm2", "q4_1"), ("wide", "q4_k"), ("qwen2_untied", "iq4_nl")])
def test_a_distilled_checkpoint_runs_in_llama_cpp(case, body, tmp_path, text):
    """Export verifies the file against the checkpoint; llama.cpp computes what its weights say."""
    folder = save_model(tmp_path / "model", case)
    path = pipeline.quantize(folder, tmp_path / "c", type=body, calibration=text, distill=3, **RECIPE)
    assert QuantizedCheckpoint(path).manifest["distill"]["kept"]
    pipeline.export(path, tmp_path / "m.gguf")
    tokens = random_tokens(1, 24)
    largest, typical = spread(llama_logits(tmp_path / "m.gguf", tokens[0].numpy()), decoded_logits(path, tokens))
    assert typical < 0.03 and largest < 0.2


def test_auto_distils_what_it_chose(model, tmp_path, text):
    path = pipeline.quantize(model, tmp_path / "c", calibration=text, distill=1, **{**RECIPE, "rotation": "auto"},
                             plus_steps=1)
    manifest = QuantizedCheckpoint(path).manifest
    assert manifest["distill"]["windows"] == 14 and manifest["auto"]["chosen"]


@pytest.mark.parametrize("fields", [{"distill": -1}, {"distill": 1, "calibration": "none", "quantizer": "rtn",
                                                       "rotation": "none"}])
def test_what_cannot_be_distilled_is_refused(fields):
    with pytest.raises(InputError, match="--distill"):
        Recipe(**fields)
    with pytest.raises(InputError, match="none to train on"):
        distill(None, None, {}, random_tokens(2), 2, DistillOptions())


def test_unfinished_shards_can_be_read(tmp_path):
    with CheckpointWriter(tmp_path / "c") as writer:
        writer.write_shard("a", {"x": np.arange(3)})
        assert np.array_equal(QuantizedCheckpoint.unfinished(writer, {}).get("x"), np.arange(3))
