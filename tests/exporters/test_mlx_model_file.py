"""The model file of MLX packages, run by mlx-lm itself: the rotated model computes what the original does."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from optrot_edge.kernels.hadamard import block_hadamard_torch
from optrot_edge.models import forward
from tests.exporters.mlx_models import (
    MODEL_FILE,
    cached_logits,
    load,
    load_model,
    logits,
    rotated_model,
    write_folder,
)
from tests.road import save_model
from tests.tiny_models import random_tokens

mx = pytest.importorskip("mlx.core", reason="MLX is made for macOS and Linux")
pytest.importorskip("mlx_lm")
CASES = ("llama_bias", "llama3_rope", "llama_linear_rope", "smollm2", "mistral", "qwen2", "qwen2_untied", "qwen3",
         "qwen3_tied")
WIDE = (3072, 5120, 14336)
HADAMARD = """
import importlib.util, sys
import mlx.core as mx
spec = importlib.util.spec_from_file_location("custom_model", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
block, rows, out = int(sys.argv[2]), mx.load(sys.argv[3]), {}
def transform(x):
    return module.block_hadamard(x, block)
for name, x in rows.items():
    for how, f in {"eager": transform, "compiled": mx.compile(transform),
                   "shapeless": mx.compile(transform, shapeless=True)}.items():
        f(x[:1])  # a shapeless graph is made for any number of rows
        for dtype in (mx.float32, mx.float16, mx.bfloat16):
            y = f(x.astype(dtype))
            assert y.dtype == dtype and y.shape == x.shape
            out[f"{how} {str(dtype).removeprefix('mlx.core.')} {name}"] = y.astype(mx.float32)
mx.savez(sys.argv[4], **out)
"""


@pytest.mark.parametrize("block", [2**power for power in range(1, 13)])
def test_transform_is_that_of_torch(block, tmp_path):
    """In a process of its own: what is wrong in one size may first be seen in another."""
    widths = [block, 3 * block, 7 * block, *(WIDE if 64 <= block <= 512 else ())]
    rng = np.random.default_rng(block)
    rows = {str(width): rng.standard_normal((2, 3, width)).astype(np.float32) for width in widths}
    rows["flat"] = np.full((1, block), 60.0, np.float32)  # 60 · 4096 is beyond float16, 60 · √4096 is not
    np.savez(tmp_path / "in.npz", **rows)
    done = subprocess.run([sys.executable, "-c", HADAMARD, MODEL_FILE, str(block), tmp_path / "in.npz",
                           tmp_path / "out.npz"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npz")
    assert len(found.files) == 9 * len(rows)
    for key in found.files:
        how, dtype, name = key.split()
        x = torch.from_numpy(rows[name]).to(getattr(torch, dtype))
        expected = block_hadamard_torch(x.double(), block).numpy()
        step = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]  # rounded once
        assert np.allclose(found[key], expected, rtol=1.01 * step, atol=2e-6), (how, dtype, name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`folders(case)`: the open original and the folder of its rotated package (R1-R4), made once; do not write."""
    made = {}

    def make(case: str):
        if case not in made:
            root = tmp_path_factory.mktemp(case)
            source, rotated = rotated_model(save_model(root / "hf", case), r3_block=16, r4_block=32)
            made[case] = source, write_folder(root / "mlx", rotated, tokenizer=root / "hf")
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_rotated_package_is_the_original(case, folders):
    """At once, compiled, one token at a time, in two parts."""
    source, path = folders(case)
    model, tokens = load(path), random_tokens(2, 24)
    expected = forward.logits(source, tokens).numpy()
    assert model.args.optrot["head_mix"] is source.config.tie_word_embeddings
    assert (hasattr(model, "head_mix"), hasattr(model, "lm_head")) == (
        (True, False) if source.config.tie_word_embeddings else (False, True))
    assert np.abs(logits(model, tokens) - expected).max() < 5e-5
    assert np.abs(logits(mx.compile(model), tokens) - expected).max() < 5e-5
    assert np.abs(cached_logits(model, tokens) - expected).max() < 5e-5
    assert np.abs(cached_logits(model, tokens, first=15) - expected).max() < 5e-5


@pytest.mark.parametrize("part", ["r3_block", "r4_block", "head_mix"])
def test_a_missing_part_is_noticed(part, folders, tmp_path):
    """r3_block apart, which never changes the logits: the keys in the cache tell."""
    source, path = folders("smollm2")
    whole, lacking = (json.loads((path / "config.json").read_text())["optrot"] for _ in range(2))
    lacking[part] = False if part == "head_mix" else None
    rotated = rotated_model(source.path, r3_block=16, r4_block=32)[1]
    if part == "head_mix":
        rotated.head_mix = lambda dtype: None
    tokens = random_tokens(1, 16)
    models = load_model(path), load_model(write_folder(tmp_path / "lacking", rotated, optrot=lacking))
    assert models[0].args.optrot == whole and models[1].args.optrot == lacking
    difference = np.abs(logits(models[0], tokens) - logits(models[1], tokens)).max()
    assert difference < 5e-5 if part == "r3_block" else difference > 0.1


def cached_keys(model, tokens) -> np.ndarray:
    """Of the first layer, [batch, heads, length, head_dim]."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    model(mx.array(tokens.numpy()), cache=cache)
    return np.array(cache[0].state[0])


def test_keys_are_rotated_before_the_cache(folders, tmp_path):
    source, path = folders("qwen3")
    rotated = rotated_model(source.path, r4_block=32)[1]
    tokens = random_tokens(1, 16)
    plain = cached_keys(load_model(write_folder(tmp_path / "plain", rotated)), tokens)
    expected = block_hadamard_torch(torch.from_numpy(plain), 16).numpy()
    assert np.abs(cached_keys(load(path), tokens) - expected).max() < 1e-5 < 0.1 < np.abs(plain - expected).max()


@pytest.mark.parametrize("case", ["smollm2", "mistral", "qwen2", "qwen3"])
def test_quantised_cache(case, folders):
    """mlx-lm's own (`--kv-bits 8`): as close as 8 bits are."""
    source, path = folders(case)
    tokens = random_tokens(2, 24)
    expected = forward.logits(source, tokens).numpy()
    found = cached_logits(load(path), tokens, first=8, kv_bits=8)
    assert np.abs(found - expected)[:, :8].max() < 5e-5
    assert 1e-4 < np.sqrt(np.square(found - expected)[:, 8:].mean()) < 0.01 * expected.std()


class LoudKeys:
    """A model with two loud channels in every key, which its queries make up for: as RoPE turns them, as a pair."""

    def __init__(self, source, factor: float = 12.0):
        self.source, self.config = source, source.config
        self.factors = torch.ones(self.config.head_dim)
        self.factors[[5, 5 + self.config.head_dim // 2]] = factor

    def __getattr__(self, name):
        if name in ("r3_block", "r4_block", "head_mix"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def layer(self, index, dtype=torch.float32):
        layer = self.source.layer(index, dtype)
        for name, factors in (("q_proj", 1 / self.factors), ("k_proj", self.factors)):
            weight = layer[f"{name}.weight"]
            layer[f"{name}.weight"] = weight * factors.repeat(len(weight) // len(factors))[:, None]
        return layer


def test_r3_makes_a_4_bit_cache_better(folders, tmp_path):
    source = LoudKeys(folders("smollm2")[0])
    tokens, error = random_tokens(4, 32), {}
    expected = forward.logits(source, tokens).numpy()
    for block in (None, 32):
        entry = {"format_version": 1, "r3_block": block, "r4_block": None, "head_mix": False}
        model = load_model(write_folder(tmp_path / str(block), source, optrot=entry))
        assert np.abs(logits(model, tokens) - expected).max() < 5e-5
        error[block] = np.square(cached_logits(model, tokens, first=16, kv_bits=4) - expected)[:, 16:].mean()
    assert error[32] < 0.5 * error[None]


def test_the_mix_is_a_linear(folders, tmp_path):
    """[out, in], by a matrix that is not symmetric."""
    source, rotated = rotated_model(folders("qwen2")[0].path, r4_block=32)
    matrix = torch.randn(96, 96, generator=torch.Generator().manual_seed(3)) / 10
    rotated.head_mix = lambda dtype=torch.float32: matrix.to(dtype)
    tokens = random_tokens(1, 12)
    expected = forward.logits(rotated, tokens).numpy()
    model = load_model(write_folder(tmp_path / "m", rotated))
    assert np.abs(logits(model, tokens) - expected).max() < 5e-5
    model.head_mix.weight = model.head_mix.weight.T
    assert np.abs(logits(model, tokens) - expected).max() > 0.1


def linear_paths(model) -> set[str]:
    return {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}


def test_modules_keep_their_paths(folders):
    """Those of mlx-lm's own model, and the mix; sharding and LoRA find theirs, and change nothing."""
    from mlx_lm.models import llama
    from mlx_lm.tuner.utils import linear_to_lora_layers

    source, path = folders("smollm2")
    model, tokens = load(path), random_tokens(1, 12)
    assert isinstance(model, llama.Model) and model.make_cache()
    assert linear_paths(model) == linear_paths(llama.Model(model.args)) | {"head_mix"}
    expected = forward.logits(source, tokens).numpy()
    model.shard()
    assert np.abs(logits(model, tokens) - expected).max() < 5e-5
    model = load(path)
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.down_proj"]})
    assert "model.layers.1.mlp.down_proj.lora_a" in dict(mlx_flat(model.trainable_parameters()))
    assert np.abs(logits(model, tokens) - expected).max() < 5e-5


def mlx_flat(parameters) -> list:
    from mlx.utils import tree_flatten

    return tree_flatten(parameters)


@pytest.mark.parametrize("case", ["smollm2", "qwen3"])
def test_quantised_by_paths(case, folders, tmp_path):
    """mlx's own quantisation with a path of its own, saved, and loaded again by what config.json says of paths."""
    import mlx.nn as nn

    source, path = folders(case)
    model, tokens = load(path), random_tokens(1, 24)
    own = {"model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 4}, "head_mix": False}
    names = set(dict(mlx_flat(model.parameters())))
    nn.quantize(model, 32, 8, class_predicate=lambda path, module: own.get(path, hasattr(module, "to_quantized")))
    assert model.layers[1].mlp.down_proj.bits == 4 and model.layers[0].mlp.down_proj.bits == 8
    quantised = dict(mlx_flat(model.parameters()))
    assert {name for name in quantised if not name.endswith((".scales", ".biases"))} == names
    found = logits(model, tokens)
    expected = forward.logits(source, tokens).numpy()
    assert np.sqrt(np.square(found - expected).mean()) < 0.1 * expected.std()
    rotated = rotated_model(source.path, r3_block=16, r4_block=32)[1]
    again = write_folder(tmp_path / "q", rotated, more={"quantization": {"group_size": 32, "bits": 8, **own}})
    mx.save_safetensors(str(again / "model.safetensors"), quantised, {"format": "mlx"})
    assert np.array_equal(logits(load_model(again), tokens), found)


def test_half_precision(folders, tmp_path):
    """As far as float16 and bfloat16 go, which is what packages are stored in."""
    source = folders("smollm2")[0]
    rotated, tokens = rotated_model(source.path, r3_block=16, r4_block=32)[1], random_tokens(1, 6)
    expected = forward.logits(source, tokens).numpy()
    for dtype, bound in ((torch.float16, 0.005), (torch.bfloat16, 0.04)):
        model = load_model(write_folder(tmp_path / str(dtype), rotated, dtype=dtype))
        assert model(mx.array(tokens.numpy())).dtype == getattr(mx, str(dtype).removeprefix("torch."))
        assert np.sqrt(np.square(logits(model, tokens) - expected).mean()) < bound * expected.std()


def test_without_trust_mlx_lm_refuses(folders):
    import mlx_lm

    with pytest.raises(ValueError, match=r"requires importing and running a custom module \('optrot_model.py'\).*"
                                         r"Pass trust_remote_code=True if you trust this model"):
        mlx_lm.load(str(folders("smollm2")[1]))


@pytest.mark.parametrize(("changes", "says"), [
    ({"optrot": {"format_version": 2}}, "format_version 2, and its model file knows only 1: upgrade"),
    ({"optrot": {}}, "format_version None"),
    ({"optrot": None}, 'nothing under "optrot"'),
    ({"optrot": {"format_version": 1, "r3_block": 64}}, "block of 64 channels is no power of two that divides 32"),
    ({"optrot": {"format_version": 1, "r4_block": 48}}, "block of 48 channels is no power of two that divides 160"),
    ({"optrot": {"format_version": 1, "r4_block": 1}}, "block of 1 channels"),
    ({"optrot": {"format_version": 1, "r4_block": True}}, "block of True channels"),
    ({"optrot": {"format_version": 1, "r4_block": 32.0}}, "block of 32.0 channels"),
    ({"tie_word_embeddings": False}, "head_mix .* but not tie_word_embeddings"),
    ({"model_type": "gemma2"}, "model_type 'gemma2': this model file is for llama, mistral, qwen2, qwen3"),
])
def test_what_does_not_fit_is_refused(changes, says, folders, tmp_path):
    rotated = rotated_model(folders("smollm2")[0].path, r3_block=16, r4_block=32)[1]
    path = write_folder(tmp_path / "m", rotated, more=changes)
    with pytest.raises(ValueError, match=says):
        load_model(path)


@pytest.mark.slow
def test_command_line(folders, tmp_path):
    """`mlx_lm generate` writes the words that the unrotated model does, with a quantised cache too."""
    source, path = folders("smollm2")
    plain = write_folder(tmp_path / "plain", source, optrot={"format_version": 1}, tokenizer=source.path)
    said = []
    for folder, options in ((plain, []), (path, []), (path, ["--kv-bits", "8", "--kv-group-size", "32",
                                                            "--quantized-kv-start", "0"])):
        command = ["mlx_lm", "generate", "--model", folder, "--trust-remote-code", "--prompt", "The function",
                   "--max-tokens", "8", *options]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split("=" * 10)[1])
    assert said[0].strip() and said[0] == said[1] == said[2]
