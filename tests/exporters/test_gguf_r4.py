"""GGUF files with R4: their marks, what reads them, what refuses them."""

import subprocess
import sys

import gguf
import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf_entries import read_entries
from optrot_edge.inspect import inspect_path
from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from optrot_edge.models.gguf_r4 import BASE_KEY, BLOCK_KEY, VERSION_KEY
from optrot_edge.runtime.backends import open_reference
from optrot_edge.runtime.text import open_tokenizer
from tests.tiny_models import random_tokens

FLOATS = dict.fromkeys(("type", "embedding_type", "head_type"), "f32")
R4 = {"rotation": "hadamard", "rotate": "r1,r2,r4", "r4_block": 32, "quantizer": "rtn", "calibration": "none"}
CASES = {"smollm2": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    """`package(case)`: the float package with R4, made once."""
    made = {}

    def path(case: str):
        if case not in made:
            made[case] = tmp_path_factory.mktemp(case) / "r4.gguf"
            pipeline.export(model(case), made[case], **R4, **FLOATS)
        return made[case]

    return path


@pytest.mark.parametrize("case", CASES)
def test_the_architecture_is_guarded_and_the_keys_are_the_bases(case, package):
    base = CASES[case]
    keys = {key: entry.value for key, entry in read_entries(package(case)).items()}
    assert keys["general.architecture"] == f"{base}-optrot".encode()
    assert keys[f"{base}.block_count"] == 2 and not any(key.startswith(f"{base}-optrot") for key in keys)
    marks = {"optrot.format_version": 1, "optrot.base_architecture": base.encode(), "optrot.r4_block": 32,
             "prism.hadamard.version": 1, "prism.hadamard.block_size": 32,
             "prism.hadamard.transform": b"normalized-sylvester-walsh-hadamard",
             "prism.hadamard.axis": b"input-last-dimension", "prism.hadamard.sign_mode": b"identity",
             "prism.hadamard.weight_names": [b"blk.0.ffn_down.weight", b"blk.1.ffn_down.weight"]}
    assert marks.items() <= keys.items()


def test_plain_files_have_no_marks(model, tmp_path):
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", **R4 | {"rotate": "r1,r2"})
    keys = read_entries(tmp_path / "m.gguf").keys()
    assert not {VERSION_KEY, BASE_KEY, BLOCK_KEY} & keys and not any(key.startswith("prism.") for key in keys)
    assert "r4_block" not in inspect_path(tmp_path / "m.gguf")


def test_llama_cpp_as_it_is_refuses_the_file(package):
    code = """
import sys, llama_cpp
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
sys.exit(7 if not model else 0)
"""
    done = subprocess.run([sys.executable, "-c", code, str(package("smollm2"))], capture_output=True, text=True)
    assert done.returncode == 7 and "unknown model architecture: 'llama-optrot'" in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_the_reader_gives_the_model_without_r4(case, model, package):
    """The same function in plain torch, which knows of no R4; a tied head is untied, for llama.cpp has no head_mix."""
    tokens = random_tokens()
    want, source = logits(open_model(model(case)), tokens), open_model(package(case))
    assert not hasattr(source, "r4_block") and not source.config.tie_word_embeddings
    assert float((logits(source, tokens) - want).abs().max() / want.std()) < 2e-5


def test_the_weights_stored_are_the_rotated_ones(model, tmp_path):
    """Codes of ffn_down in the file are those of the checkpoint, whose weights R4 has been fused into."""
    path = pipeline.quantize(model("smollm2"), tmp_path / "c", **R4, type="q8_0")
    pipeline.export(path, tmp_path / "m.gguf")
    checkpoint = QuantizedCheckpoint(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.1.ffn_down.weight"]
    found = gguf.quants.dequantize(stored.data, stored.tensor_type)
    np.testing.assert_array_equal(found, checkpoint.weights("layers.1.down_proj.weight"))
    plain = open_model(tmp_path / "m.gguf").layer(1)["down_proj.weight"].numpy()
    assert np.abs(plain - found).max() > 0.1 * np.abs(found).max()


def test_inspect_plan_and_summary(model, package, tmp_path):
    about = inspect_path(package("smollm2"))
    assert (about["architecture"], about["r4_block"], about["layers"]) == ("llama-optrot", 32, 2)
    planned = pipeline.plan(model("smollm2"), packaged=True, **R4, type="q8_0")
    summary = pipeline.export(model("smollm2"), tmp_path / "m.gguf", **R4, type="q8_0")
    assert planned["rotated"] == ["r1", "r2", "r4"] and planned["unties_head"] is True
    assert "llama.cpp's own tools refuse the file as llama-optrot" in summary["notes"][-1]
    assert sum(tensor.n_bytes for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors) == planned["bytes"]


def test_a_size_counts_the_marks(model, tmp_path, text):
    """The file of a target size is never larger, its longer list of keys included."""
    fields = R4 | {"quantizer": "gptq", "calibration": text, "nsamples": 4, "seqlen": 32, "target_size": 170_000}
    pipeline.export(model("smollm2"), tmp_path / "m.gguf", **fields)
    assert 0.9 * 170_000 < (tmp_path / "m.gguf").stat().st_size <= 170_000


def test_its_tokenizer_and_its_quantising_again(model, package, tmp_path):
    """A vocabulary with the guarded architecture still tokenises; quantised again without R4 the file is plain."""
    again = pipeline.quantize(package("smollm2"), tmp_path / "c", type="q8_0", quantizer="rtn", calibration="none",
                              rotation="none")
    with open_reference(package("smollm2"), "llama.cpp") as backend:
        assert open_tokenizer(again).tokenize("Hello there") == backend.tokenize("Hello there", add_bos=False)
    pipeline.export(again, tmp_path / "m.gguf")
    assert read_entries(tmp_path / "m.gguf")["general.architecture"].value == b"llama"
    tokens = random_tokens()
    want, found = (logits(open_model(path), tokens) for path in (model("smollm2"), tmp_path / "m.gguf"))
    assert float((found - want).square().mean().sqrt() / want.std()) < 0.05


def damaged(path, tmp_path, old: bytes, new: bytes):
    assert len(old) == len(new) and path.read_bytes().count(old) >= 1
    out = tmp_path / "damaged.gguf"
    out.write_bytes(path.read_bytes().replace(old, new, 1))
    return out


def u32(key: bytes, value: int) -> bytes:
    return key + (4).to_bytes(4, "little") + value.to_bytes(4, "little")


@pytest.mark.parametrize(("old", "new", "message"), [
    (b"optrot.r4_block", b"optrot.r4_blick", "llama-optrot but lacks optrot.r4_block"),
    (u32(b"optrot.r4_block", 32), u32(b"optrot.r4_block", 64), "is 64, which is no power of two that divides .* 160"),
    (u32(b"optrot.r4_block", 32), u32(b"optrot.r4_block", 0), "is 0, which is no power of two"),
    (u32(b"optrot.format_version", 1), u32(b"optrot.format_version", 2), "written by a newer optrot-edge"),
    (b"optrot.format_version", b"optrot.format_varsion", "optrot.format_version is None"),
])
def test_marks_that_make_no_sense_are_refused_by_everything(old, new, message, package, tmp_path):
    path = damaged(package("smollm2"), tmp_path, old, new)
    for use in (inspect_path, open_model, lambda path: open_reference(path, "llama.cpp")):
        with pytest.raises(InputError, match=message):
            use(path)


def test_without_the_guard_the_marks_still_count(package, tmp_path, model):
    """An architecture set back to the base by some other tool changes nothing here."""
    reader = gguf.GGUFReader(package("smollm2"))
    writer = gguf.GGUFWriter(tmp_path / "plain.gguf", "llama")
    for key, entry in read_entries(package("smollm2")).items():
        if key != "general.architecture":
            writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert b"llama-optrot" not in (tmp_path / "plain.gguf").read_bytes()
    tokens = random_tokens(1, 12)
    want = logits(open_model(model("smollm2")), tokens)[0].numpy()
    with open_reference(tmp_path / "plain.gguf", "llama.cpp") as backend:
        assert np.abs(backend.logits(tokens[0].numpy()) - want).max() < 0.02 * want.std()
