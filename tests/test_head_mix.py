"""A tied head that R1 leaves tied, through a matrix: the same function, all along the road."""

from __future__ import annotations

import dataclasses
import re
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from optrot_edge import auto, pipeline
from optrot_edge.budget import check_target
from optrot_edge.checkpoint import CheckpointWriter, QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_plan import plan_gguf
from optrot_edge.inspect import inspect_path
from optrot_edge.models import forward, open_model
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.family import HEAD_MIX
from optrot_edge.quantize.distill import DistillOptions, Student, _Distillation
from optrot_edge.quantize.matrices import MatrixQuantizer, QuantizerOptions
from optrot_edge.quantize.sequential import SequentialQuantizer
from optrot_edge.quantize.streams import Stream
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.distributed import World
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.optrot import initial_rotation
from optrot_edge.rotations.sensitivity import head_gradient
from optrot_edge.runtime.decoded_checkpoint import DecodedCheckpoint
from optrot_edge.tensor_types import tensor_types
from tests.road import save_model
from tests.tiny_models import random_tokens

TIED = ("smollm2", "llama_bias", "qwen2", "qwen3_tied")
ONLINE = {"rotation": "hadamard", "rotate": "r1,r2,r3,r4", "r4_block": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model", "smollm2")


def rotation_for(config, which="r1,r2", **blocks):
    return initial_rotation(config, set(which.split(",")), torch.Generator().manual_seed(0), **blocks)


def largest_difference(model, source, dtype=torch.float64) -> float:
    """Of the logits, in units of the largest."""
    want, got = (forward.logits(each, random_tokens(), dtype=dtype) for each in (source, model))
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("case", TIED)
def test_the_head_stays_tied_and_the_function_the_same(case, tiny):
    source = open_model(tiny(case))
    rotated = RotatedModel(source, rotation_for(source.config, r3_block=16, r4_block=32), keep_tied=True)
    assert rotated.config.tie_word_embeddings and rotated.config.head_mix and rotated.lm_head() is None
    assert torch.equal(rotated.final_norm(), torch.ones(source.config.hidden_size))
    assert largest_difference(rotated, source) < 1e-10
    rotated.head_mix = lambda dtype: None
    assert largest_difference(rotated, source) > 1e-2


@pytest.mark.parametrize(("case", "which", "gain"), [("llama", "r1,r2", None), ("smollm2", "r2", None),
                                                     ("smollm2", "r1,r2", 1.5)])
def test_where_nothing_needs_to_be_kept(case, which, gain, tiny):
    """An untied head, no R1, a constant gain."""
    source = open_model(tiny(case))
    if gain is not None:
        source.final_norm = lambda dtype=torch.float32: torch.full((source.config.hidden_size,), gain, dtype=dtype)
    rotated = RotatedModel(source, rotation_for(source.config, which), keep_tied=True)
    assert rotated.head_mix() is None and not rotated.config.head_mix
    assert rotated.config.tie_word_embeddings is source.config.tie_word_embeddings
    assert largest_difference(rotated, source) < 1e-10


def test_only_online_rotations_keep_it(model, tmp_path):
    tokens, source = random_tokens(), open_model(model)
    """And not R4 in GGUF, where llama.cpp can be made to run R4 but no such matrix."""
    for format, rotate, head in (("gguf", "r1,r2", "lm_head.weight"), ("gguf", "r1,r4", "lm_head.weight"),
                                 ("mlx", "r1,r4", HEAD_MIX), ("gguf", "r1,r3", HEAD_MIX)):
        floats = dict.fromkeys(("type", "embedding_type", "head_type"), "f32") | {"dtype": "float32"}
        if format == "gguf":
            floats.pop("dtype")
        path = pipeline.quantize(model, tmp_path / f"{format}-{rotate}", format=format, quantizer="rtn",
                                 calibration="none", **floats, **ONLINE | {"rotate": rotate})
        decoded = DecodedCheckpoint(path)
        assert {"lm_head.weight", HEAD_MIX} & set(decoded.checkpoint.names) == {head}
        assert largest_difference(decoded, source, torch.float32) < 1e-5
        assert decoded.config.head_mix is (head == HEAD_MIX)
        hidden = forward.final_hidden(decoded, tokens)
        assert torch.allclose(F.linear(hidden, decoded.embedding()), forward.logits(decoded, tokens)) is (
            head == HEAD_MIX)


def test_plan_and_checkpoint_agree(model, tmp_path, text):
    """Quantised by GPTQ with the float model close by, of the bytes that the plan said: M where a head would be."""
    fields = ONLINE | {"type": "q8_0", "nsamples": 16, "seqlen": 32, "calibration": text}
    planned = pipeline.plan(model, **fields)
    apart = pipeline.plan(model, **fields | {"rotate": "r1,r2"})
    path = pipeline.quantize(model, tmp_path / "c", **fields)
    manifest = QuantizedCheckpoint(path).manifest
    assert manifest["tensors"][HEAD_MIX] | {"file": ""} == {"file": "", "dtype": "float16", "shape": [96, 96]}
    assert planned["bytes"] == inspect_path(path)["bytes_packed"]
    assert apart["bytes"] - planned["bytes"] == 512 * 96 * 8.5 / 8 - 96 * 96 * 2
    assert (planned["unties_head"], apart["unties_head"]) == (False, True)
    assert planned["types"]["head"] == "q8_0, f16" and "embedding" in planned["types"]
    source, decoded, tokens = open_model(model), DecodedCheckpoint(path), random_tokens()
    want, got = (forward.logits(each, tokens).log_softmax(-1) for each in (source, decoded))
    assert float((want.exp() * (want - got)).sum(-1).mean()) < 2e-3


def head_codes(rotated, hidden, types) -> np.ndarray:
    """Of the tied head solved for on these inputs [..., hidden]."""
    hidden = hidden.flatten(0, 1)
    quantizer = MatrixQuantizer(QuantizerOptions(types), World("cpu"))
    return quantizer.plain("embed_tokens", rotated.chunks("embed_tokens.weight"),
                           (hidden.T @ hidden).double() / len(hidden)).codes


def test_the_heads_hessian_is_that_of_what_it_reads(model, tmp_path):
    source, tokens = open_model(model), random_tokens(16, 32)
    rotated = RotatedModel(source, rotation_for(source.config), keep_tied=True)
    types = tensor_types(source.family, rotated.config, Recipe(type="f32", head_type="q4_0", rotation="none"))
    with CheckpointWriter(tmp_path / "c") as writer:
        SequentialQuantizer(rotated, QuantizerOptions(types), tokens).run(writer)
        checkpoint = QuantizedCheckpoint(writer.finish({"model": rotated.config.to_dict()}))
    codes = checkpoint.get("embed_tokens.weight").codes
    stored = rotated.head_mix().half().float()
    rotated.head_mix = lambda dtype: stored
    assert (head_codes(rotated, forward.final_hidden(rotated, tokens), types) == codes).mean() > 0.9999
    rotated.head_mix = lambda dtype: None
    assert (head_codes(rotated, forward.final_hidden(rotated, tokens), types) == codes).mean() < 0.95
    with pytest.raises(InputError, match=r"package with its own model file; quantise again with --format\s+gguf"):
        plan_gguf(checkpoint)


def test_gradient_of_the_end_of_the_model(tiny):
    """The float model's, in the rotated basis."""
    source = open_model(tiny("qwen2"))
    rotated = RotatedModel(source, rotation_for(source.config), keep_tied=True)
    r1 = rotated.rotation.r1.float()
    x = torch.randn(3, 8, source.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def gradient(model, x):
        stream = Stream(*x.shape)
        stream.write(slice(0, len(x)), x)
        return head_gradient(model, stream, torch.Generator().manual_seed(2), "cpu")

    want = gradient(source, x) @ r1
    assert torch.allclose(gradient(rotated, x @ r1), want, atol=1e-5 * float(want.abs().max()))


def test_distillation_sees_the_matrix(model, tmp_path):
    """Gradients by autograd over the whole graph; the matrix itself stays as it is."""
    path = pipeline.quantize(model, tmp_path / "c", quantizer="rtn", calibration="none", type="q4_1", **ONLINE)
    checkpoint, source, tokens = QuantizedCheckpoint(path), open_model(model), random_tokens(4, 12)
    run = _Distillation(source, Student(checkpoint), tokens, 1, DistillOptions(), dtype=torch.float64)
    found = run.gradients(torch.tensor([2, 0]))
    kl, gradients = next(found), dict(found)
    assert HEAD_MIX not in gradients
    decoded = DecodedCheckpoint(checkpoint)
    gain = decoded.final_norm(torch.float64).requires_grad_()
    mix, rope = decoded.head_mix(torch.float64), forward.rope_tables(decoded.config, 12, dtype=torch.float64)
    x = F.embedding(tokens[[2, 0]], decoded.embedding(torch.float64))
    for index in range(decoded.config.num_hidden_layers):
        x = forward.decoder_layer(x, decoded.layer(index, torch.float64), decoded.config, rope,
                                  r3_block=decoded.r3_block, r4_block=decoded.r4_block)
    hidden = forward.rms_norm(x, gain, decoded.config.rms_norm_eps) @ mix.T
    mine = F.linear(hidden, decoded.embedding(torch.float64)).log_softmax(-1)
    wanted = forward.logits(source, tokens[[2, 0]], dtype=torch.float64).log_softmax(-1)
    expected = F.kl_div(mine, wanted, log_target=True, reduction="sum") / 24
    expected.backward()
    assert kl == pytest.approx(float(expected.detach()), rel=1e-9)
    oracle = run.student.tensor("norm.weight").gradient(gain.grad)
    assert torch.allclose(gradients["norm.weight"]["values"], oracle["values"], rtol=1e-7, atol=1e-12)
    p, q = (forward.logits(each, tokens[3:], dtype=torch.float64).log_softmax(-1) for each in (source, decoded))
    assert float(run.held_out_kl().mean()) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)


@pytest.mark.parametrize("kind", ["q4_k_m", "q4_0", "int4-g32-sym", "f16"])
def test_its_type_is_a_float_whatever_the_recipe_says(kind, model):
    source = open_model(model)
    config = dataclasses.replace(source.config, head_mix=True)
    for head, mine in ((None, "f16"), ("f32", "f32")):
        recipe = Recipe(type=kind, head_type=head, rotation="none", tensor_type=[".=q5_0"] * (head is None))
        assert tensor_types(source.family, config, recipe)[HEAD_MIX] == mine
    with pytest.raises(InputError, match="head_mix=q8_0: no matrix"):
        tensor_types(source.family, config, Recipe(type=kind, rotation="none", tensor_type=["head_mix=q8_0"]))


def test_a_target_size_pays_for_it(model):
    source, recipe = open_model(model), Recipe(target_size=200_000)
    config = dataclasses.replace(source.config, head_mix=True)
    types = tensor_types(source.family, config, recipe)
    assert types[HEAD_MIX] == "f16" and set(types.values()) == {"f16", None}
    assert check_target(source, config, recipe) == 200_000
    least = []
    for each in (source.config, config):
        with pytest.raises(InputError, match="the smallest types take") as caught:
            check_target(source, each, Recipe(target_size=1))
        least.append(int(re.search(r"take ([\d,]+) bytes", str(caught.value))[1].replace(",", "")))
    assert least[1] - least[0] == 96 * 96 * 2


def test_auto_says_what_rules_r1_out(model):
    source = open_model(model)
    recipe = Recipe(rotate="r1,r2,r3,r4", r4_block=32, nsamples=16, seqlen=32)
    arms = auto.candidates(source, recipe, pipeline._stored_bits(source, recipe))
    skipped = [arm for arm in arms if arm.skipped]
    assert [arm.name for arm in skipped] == ["OptRot", "OptRot+ (R1, R2, R3, R4, scales)"]
    weights = 8 * (96 * 96 * 2) / sum(map(prod, auto._shapes(source)))
    assert skipped[0].bits_per_weight - arms[0].bits_per_weight == pytest.approx(weights)
    assert skipped[0].skipped.startswith(f"R1 ties the head through another matrix: {weights:.2f} more bits per weight")


def test_configurations(model):
    """Those of older checkpoints have no such field; nonsense is refused."""
    fields = open_model(model).config.to_dict()
    fields.pop("head_mix")
    assert ModelConfig.from_dict(fields).head_mix is False
    with pytest.raises(InputError, match="head_mix is set, but the head is not tied"):
        ModelConfig.from_dict(fields | {"head_mix": True, "tie_word_embeddings": False})
