"""Rotated float GGUFs: read back to the bit, run by llama.cpp, and quantised by llama-quantize."""

from __future__ import annotations

import subprocess

import gguf
import numpy as np
import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.inspect import inspect_path
from optrot_edge.models import open_model
from tests.exporters.gguf_models import llama_logits
from tests.exporters.test_gguf import check_logits
from tests.llama_tools import llama_tool
from tests.road import save_model
from tests.tiny_models import random_tokens

HADAMARD = {"rotation": "hadamard", "quantizer": "rtn", "calibration": "none"}


@pytest.mark.parametrize(("kind", "name", "bound"), [("f32", "ALL_F32", 2e-5), ("f16", "MOSTLY_F16", 0.02),
                                                     ("bf16", "MOSTLY_BF16", 0.1)])
def test_rotated_floats_in_llama_cpp(kind, name, bound, model, tmp_path):
    """All matrices of one type, the head too; bfloat16 activations have 8 bits."""
    summary = pipeline.export(model("smollm2"), tmp_path / "m.gguf", type=kind, checkpoint=tmp_path / "c", **HADAMARD)
    assert summary["file_type"] == name
    kinds = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if len(t.shape) == 2}
    assert kinds == {kind.upper()} == {entry.upper() for entry in inspect_path(tmp_path / "m.gguf")["types"]} - (
        {"F32"} - {kind.upper()})
    checkpoint = QuantizedCheckpoint(tmp_path / "c")
    assert check_logits(checkpoint, tmp_path / "m.gguf")[0] < bound
    source = open_model(tmp_path / "m.gguf")
    for linear in ("q_proj", "down_proj"):
        stored = checkpoint.weights(f"layers.1.{linear}.weight")
        np.testing.assert_array_equal(source.layer(1)[f"{linear}.weight"].numpy(), stored)
        if kind == "bf16":
            np.testing.assert_array_equal(torch.from_numpy(stored).bfloat16().float().numpy(), stored)
    bits = inspect_path(tmp_path / "c")["bits_per_weight"]
    assert bits == pytest.approx({"f32": 32, "f16": 16, "bf16": 16}[kind], rel=0.01)


def test_bfloat16_here_and_there(model, tmp_path):
    pipeline.export(model("qwen3"), tmp_path / "m.gguf", type="q4_0", embedding_type="bf16", head_type="q8_0",
                    tensor_type=["attn_v=bf16"], rotation="none", quantizer="rtn", calibration="none")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_v.weight"] == "BF16"
    assert kinds["blk.0.attn_q.weight"] == "Q4_0" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert np.isfinite(llama_logits(tmp_path / "m.gguf", random_tokens(1, 8)[0].numpy())).all()


def test_a_rotation_that_needs_a_type_says_what_to_do(model, tmp_path):
    with pytest.raises(InputError, match="--type f16 use none, hadamard, optrot, or a file that"):
        pipeline.export(model("smollm2"), tmp_path / "m.gguf", type="f16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_llama_quantize_takes_it(kind, tmp_path):
    tool, model = llama_tool("llama-quantize"), save_model(tmp_path / "model", "wide")
    pipeline.export(model, tmp_path / "m.gguf", type=kind, **HADAMARD)
    done = subprocess.run([tool, tmp_path / "m.gguf", tmp_path / "q.gguf", "Q4_K_M", "1"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tokens = random_tokens(1, 24)[0].numpy()
    float_logits, quantised = (llama_logits(tmp_path / name, tokens) for name in ("m.gguf", "q.gguf"))
    assert np.sqrt(np.square(quantised - float_logits).mean()) / float_logits.std() < 0.2
    quantised_again = open_model(tmp_path / "q.gguf")  # and this reader takes what llama-quantize made of it
    assert torch.isfinite(quantised_again.layer(0)["down_proj.weight"]).all()
