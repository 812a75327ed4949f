"""Every type that GGUF files can have, from a checkpoint into real llama.cpp; and llama-quantize's fallbacks."""

from __future__ import annotations

import ctypes

import gguf
import llama_cpp
import numpy as np
import pytest

from optrot_edge.checkpoint import GGUF_GRIDS, QuantizedCheckpoint
from optrot_edge.exporters.gguf import export_gguf
from optrot_edge.gridspec import FALLBACKS, fitting_type
from optrot_edge.models import open_model
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_models import write_checkpoint
from tests.exporters.test_gguf import check_logits
from tests.tiny_models import WIDE, random_tokens

FILE_TYPES = {"q2_k": "Q2_K", "q3_k": "Q3_K_S", "q4_k": "Q4_K_S", "q5_k": "Q5_K_S", "mxfp4": "MXFP4_MOE"}


def matrix_types(path) -> set[str]:
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) == 2}


def llama_quantize(source, out, file_type: str) -> set[str]:
    """llama.cpp's own quantiser on the GGUF `source`, every matrix asked to be of one type; the types it chose."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread = int(gguf.LlamaFileType[f"MOSTLY_{file_type}"]), True, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)) == 0
    return matrix_types(out)


@pytest.mark.parametrize("grid", [name for name, spec in GGUF_GRIDS.items() if spec.subscales or spec.codebook])
def test_every_type_in_llama_cpp(grid, tmp_path):
    """What llama.cpp computes from the file is what the checkpoint decodes to, but for its 8-bit activations."""
    checkpoint = write_checkpoint(tmp_path, "wide", grid, grid)
    summary = export_gguf(checkpoint, tmp_path / "m.gguf")
    assert summary["file_type"] == f"MOSTLY_{FILE_TYPES.get(grid, grid.upper())}"
    assert matrix_types(tmp_path / "m.gguf") == {grid.upper()}
    largest, spread = check_logits(checkpoint, tmp_path / "m.gguf")
    assert spread < 0.03 and largest < 0.2
    name = "layers.0.down_proj.weight"
    read = open_model(tmp_path / "m.gguf").layer(0)["down_proj.weight"].float().numpy()
    np.testing.assert_array_equal(read, QuantizedCheckpoint(tmp_path / "checkpoint").weights(name))


@pytest.mark.slow
@pytest.mark.parametrize("grid", [*GGUF_GRIDS, "float16"])
@pytest.mark.parametrize("case", WIDE)
def test_every_type_and_family(case, grid, tmp_path):
    """Loads, computes what the checkpoint decodes to, and writes the same tokens every time it is opened."""
    tokenizer = "qwen2" if "qwen" in case else "smollm"
    checkpoint = write_checkpoint(tmp_path, case, grid, grid, tokenizer=tokenizer)
    export_gguf(checkpoint, tmp_path / "m.gguf")
    assert matrix_types(tmp_path / "m.gguf") == {grid.upper().replace("FLOAT", "F")}
    largest, spread = check_logits(checkpoint, tmp_path / "m.gguf")
    assert spread < 0.03 and largest < 0.2
    answers, prompt = [], random_tokens(1, 12)[0].numpy()
    for _ in range(2):
        with LlamaCppBackend(tmp_path / "m.gguf") as backend:
            answers += [backend.generate(prompt, 24), backend.generate(prompt, 24)]
            assert not answers[0] or answers[0][0] == backend.logits(prompt)[-1].argmax()
    assert answers[1:] == answers[:-1]


@pytest.mark.parametrize("grid", FALLBACKS)
def test_fallbacks_are_llama_quantizes(grid, tmp_path):
    """Rows of 96 and 160 weights, in the llama.cpp that is installed."""
    export_gguf(write_checkpoint(tmp_path, "llama", "float32", "float32"), tmp_path / "m.gguf")
    chosen = llama_quantize(tmp_path / "m.gguf", tmp_path / "q.gguf", FILE_TYPES.get(grid, grid.upper()))
    assert chosen == {fitting_type(grid, 96).upper()} == {fitting_type(grid, 160).upper()}
    assert fitting_type(grid, 512) == grid
