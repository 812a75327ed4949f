"""The benchmark's model: noise of one step per block, a control that computes the same function."""

import json

import gguf
import numpy as np
import testbed
import torch

from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from tests.tiny_gguf import gguf_tensors, write_gguf
from tests.tiny_models import random_tokens


def test_noise_is_uniform_over_one_step_of_its_block():
    rng = np.random.default_rng(0)
    weights = (rng.normal(size=(256, 96)) * np.exp(rng.normal(size=(256, 1)))).astype(np.float32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    steps = np.ascontiguousarray(blocks.reshape(-1, 20)[:, :2]).view(np.float16).astype(np.float32)
    noise = testbed._noise(blocks, weights.shape, rng).reshape(-1, 32) / steps
    assert -0.5 <= noise.min() < -0.499
    assert 0.499 < noise.max() <= 0.5
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() * 12 - 1) < 0.02


def test_the_control_is_another_model_of_the_same_function(tiny, tmp_path):
    folder = tiny("smollm2")
    config = json.loads((folder / "config.json").read_text())
    before = gguf_tensors(folder)
    after = dict(before)
    testbed.permute(after, heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
                    rng=np.random.default_rng(0))
    plain = write_gguf(tmp_path / "plain.gguf", folder)
    permuted = write_gguf(tmp_path / "permuted.gguf", folder, extra=after)
    tokens = random_tokens()
    expected = logits(open_model(plain), tokens, dtype=torch.float64)
    found = logits(open_model(permuted), tokens, dtype=torch.float64)
    assert (expected - found).abs().max() <= 1e-12 * expected.abs().max()
    for name, weights in before.items():
        assert after[name].shape == weights.shape
        assert not np.array_equal(after[name], weights), name
        assert np.array_equal(np.sort(after[name], axis=None), np.sort(weights, axis=None)), name


def test_grouped_value_heads_are_shuffled_inside_themselves():
    rng = np.random.default_rng(1)
    value, output = rng.normal(size=(8, 6)), rng.normal(size=(6, 16))  # 2 kv heads of 4, 4 query heads
    tensors = {"blk.0.attn_v.weight": value, "blk.0.attn_output.weight": output}
    testbed._permute_values(tensors, "blk.0.", heads=4, kv_heads=2, rng=rng)
    moved, columns = tensors["blk.0.attn_v.weight"], tensors["blk.0.attn_output.weight"]
    for head in range(4):
        old, new = slice(4 * head, 4 * head + 4), slice(4 * (head // 2), 4 * (head // 2) + 4)
        np.testing.assert_allclose(columns[:, old] @ moved[new], output[:, old] @ value[new], atol=1e-14)
    assert not np.array_equal(moved, value)
