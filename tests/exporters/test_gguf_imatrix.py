"""Our importance matrix: the sums it should hold, llama.cpp's layout, and the real llama-quantize."""

from __future__ import annotations

import subprocess

import gguf
import numpy as np
import pytest
import torch

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_imatrix import export_imatrix
from optrot_edge.models import forward, open_model
from optrot_edge.quantize.calibration import load_text, sample_windows
from optrot_edge.runtime.text import open_tokenizer
from tests.llama_tools import llama_tool
from tests.road import save_model

FAST = {"rotation": "hadamard", "nsamples": 4, "seqlen": 32}


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """Rotated F16 GGUF, its imatrix and the model, whose rows fill super-blocks."""
    root = tmp_path_factory.mktemp("imatrix")
    model = save_model(root / "model", "wide")
    summary = pipeline.export(model, root / "f16.gguf", type="f16", calibration=text, checkpoint=root / "c",
                              save_imatrix=root / "imatrix.gguf", **FAST)
    assert summary["imatrix"] == str(root / "imatrix.gguf")
    return root


def tensors(path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


def test_layout_is_llama_imatrix_s(made, text):
    """Keys, their types and tensor names as `tools/imatrix/imatrix.cpp` writes them."""
    reader = gguf.GGUFReader(made / "imatrix.gguf")
    keys = {key: (field.types, field.contents()) for key, field in reader.fields.items()}
    kinds = gguf.GGUFValueType
    assert keys["general.type"] == ([kinds.STRING], "imatrix")
    assert keys["imatrix.datasets"] == ([kinds.ARRAY, kinds.STRING], [text])
    assert keys["imatrix.chunk_count"] == ([kinds.UINT32], 4) and keys["imatrix.chunk_size"] == ([kinds.UINT32], 32)
    assert keys["optrot.rotation.applied"][1] == "r1,r2" and "general.architecture" not in keys
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    names = [*(f"blk.0.{name}.weight" for name in linears), "output.weight"]
    wanted = {f"{name}.{part}" for name in names for part in ("in_sum2", "counts")}
    assert {tensor.name for tensor in reader.tensors} == wanted
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32"}
    found = tensors(made / "imatrix.gguf")
    assert found["blk.0.ffn_down.weight.in_sum2"].shape == (512,) and found["blk.0.attn_q.weight.counts"] == [128]


def test_sums_are_those_of_the_rotated_model(made, text):
    """The first matrix's inputs, from the file's own weights: norm of the rotated embedding."""
    source = open_model(made / "f16.gguf")
    tokenizer = open_tokenizer(made / "model")
    ids = sample_windows(tokenizer.tokenize(load_text(text)), 4, 32, 0, tokenizer.bos if tokenizer.adds_bos else None,
                         more=0, spare=0)
    tokenizer.close()
    stream = source.embedding()[torch.from_numpy(ids)]
    seen = forward.rms_norm(stream, source.layer(0)["attn_norm.weight"], source.config.rms_norm_eps)
    found = tensors(made / "imatrix.gguf")
    for name in ("attn_q", "attn_k", "attn_v"):
        np.testing.assert_allclose(found[f"blk.0.{name}.weight.in_sum2"], seen.square().sum((0, 1)).numpy(), rtol=5e-3)
    assert np.array_equal(found["blk.0.ffn_up.weight.in_sum2"], found["blk.0.ffn_gate.weight.in_sum2"])


def test_quantised_tied_and_resumed(model, text, tmp_path):
    """A tied head is named after the embedding; a run that was stopped keeps what it saw."""
    options = {"calibration": text, "type": "q4_0", **FAST, "rotation": "none"}
    pipeline.quantize(model("smollm2"), tmp_path / "whole", save_imatrix=tmp_path / "whole.gguf", **options)

    def stop(stage, done, *_):
        if (stage, done) == ("quantise layers", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model("smollm2"), tmp_path / "c", progress=stop, **options)
    pipeline.quantize(model("smollm2"), tmp_path / "c", save_imatrix=tmp_path / "resumed.gguf", **options)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "resumed.gguf").read_bytes()
    assert "token_embd.weight.in_sum2" in tensors(tmp_path / "whole.gguf")


def test_refusals(made, model, text, tmp_path):
    checkpoint = QuantizedCheckpoint(made / "c")
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(InputError, match="taken.gguf exists"):
        export_imatrix(checkpoint, tmp_path / "taken.gguf")
    with pytest.raises(InputError, match="--save-imatrix holds what calibration saw"):
        pipeline.quantize(model("smollm2"), tmp_path / "c", save_imatrix=tmp_path / "i.gguf", quantizer="rtn",
                          calibration="none", rotation="none")
    bare = pipeline.quantize(model("smollm2"), tmp_path / "c", quantizer="rtn", calibration="none", rotation="none")
    with pytest.raises(InputError, match="made without calibration text"):
        export_imatrix(QuantizedCheckpoint(bare), tmp_path / "i.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "taken.gguf"]


@pytest.mark.slow
def test_real_llama_quantize_takes_it(made, tmp_path):
    """It finds an entry for every matrix, and an iq2_xs file, which it refuses to make without an imatrix."""
    tool = llama_tool("llama-quantize")
    command = [tool, "--imatrix", made / "imatrix.gguf", made / "f16.gguf", tmp_path / "q.gguf", "IQ2_XS", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "loaded 8 importance matrix entries" in said and "computed on 4 chunks" in said
    assert said.count("did not find weights") == said.count("find weights for token_embd.weight") == 1  # a lookup
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == "IQ2_XS"
