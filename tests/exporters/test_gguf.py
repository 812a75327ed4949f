"""GGUF files of every family in real llama.cpp, and what the exporter refuses."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import subprocess
import sys

import gguf
import numpy as np
import pytest

from optrot_edge.checkpoint import CheckpointWriter, QuantizedCheckpoint, QuantizedTensor, grid_spec
from optrot_edge.errors import InputError, StorageError
from optrot_edge.exporters.gguf import export_gguf, write_gguf
from optrot_edge.exporters.gguf_entries import read_entries
from optrot_edge.exporters.gguf_plan import plan_gguf
from optrot_edge.exporters.gguf_verify import verify_gguf
from optrot_edge.models import open_model
from optrot_edge.models.config import ModelConfig
from optrot_edge.models.forward import logits
from tests.exporters.gguf_models import Decoded, llama_logits, write_checkpoint
from tests.tiny_models import CASES, random_tokens

QUANTISED = [("q4_0", "q5_0"), ("q4_1", "float16"), ("q5_0", "q8_0"), ("q5_1", "q4_0"), ("q8_0", "q4_1")]


def check_logits(checkpoint, path, *, length=24) -> tuple[float, float]:
    """Largest and root-mean-square difference between llama.cpp and the decoded weights, in units
    of the logits' standard deviation."""
    tokens = random_tokens(1, length)
    config = ModelConfig.from_dict(checkpoint.manifest["model"])
    ours = logits(Decoded(checkpoint, config), tokens)[0].numpy()
    difference = llama_logits(path, tokens[0].numpy()) - ours
    return np.abs(difference).max() / ours.std(), np.sqrt(np.square(difference).mean()) / ours.std()


@pytest.mark.parametrize("case", [case for case in CASES if case != "mistral_window"])
def test_float_checkpoint_equals_llama_cpp(case, tmp_path):
    checkpoint = write_checkpoint(tmp_path, case, "float32", "float32")
    assert export_gguf(checkpoint, tmp_path / "m.gguf")["file_type"] == "ALL_F32"
    largest, _ = check_logits(checkpoint, tmp_path / "m.gguf")
    assert largest < 2e-5


@pytest.mark.parametrize(("case", "body", "table"),
                         [(case, *QUANTISED[i % 5]) for i, case in enumerate(CASES) if "window" not in case])
def test_quantised_checkpoint_in_llama_cpp(case, body, table, tmp_path):
    """llama.cpp rounds activations to 8 bits per 32: about 1-2 % of the logits' spread here."""
    checkpoint = write_checkpoint(tmp_path, case, body, table)
    summary = export_gguf(checkpoint, tmp_path / "m.gguf")
    assert summary["file_type"] == f"MOSTLY_{body.upper()}"
    largest, spread = check_logits(checkpoint, tmp_path / "m.gguf")
    assert spread < 0.03 and largest < 0.2


def test_wrong_row_order_would_be_seen(tmp_path):
    """The file without the q/k permutation is caught by the logits and by the verification."""
    checkpoint = write_checkpoint(tmp_path, "llama_bias", "q8_0")
    plan = plan_gguf(checkpoint)
    assert sum(bool(tensor.heads) for tensor in plan.tensors) == 8  # q and k, weight and bias, two layers
    straight = dataclasses.replace(
        plan, tensors=[dataclasses.replace(tensor, heads=0) for tensor in plan.tensors])
    write_gguf(straight, checkpoint, tmp_path / "wrong.gguf", lambda *_: None)
    assert check_logits(checkpoint, tmp_path / "wrong.gguf")[1] > 0.1
    with pytest.raises(RuntimeError, match=r"blk.0.attn_q.weight: codes read back differently"):
        verify_gguf(tmp_path / "wrong.gguf", checkpoint, plan)


def test_sliding_window_becomes_the_context_length(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "mistral_window", "float32", "float32")
    summary = export_gguf(checkpoint, tmp_path / "m.gguf")
    assert read_entries(tmp_path / "m.gguf")["llama.context_length"].value == 8
    assert "sliding window of 8 tokens" in summary["notes"][0]
    assert check_logits(checkpoint, tmp_path / "m.gguf", length=8)[0] < 2e-5


def test_keys_and_summary(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama3_rope", "q4_0", "q8_0")
    seen = []
    summary = export_gguf(checkpoint, tmp_path / "m.gguf", name="Tiny",
                          progress=lambda *event: seen.append(event))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "Tiny",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0, "general.quantization_version": 2,
        "llama.block_count": 2, "llama.context_length": 256, "llama.embedding_length": 128,
        "llama.feed_forward_length": 224, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 32,
        "llama.attention.value_length": 32, "llama.rope.dimension_count": 32, "llama.vocab_size": 512,
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.eos_token_id": 2,
    }
    assert expected.items() <= keys.items()
    assert not any(key.startswith("llama.rope.scaling") for key in keys)  # Llama 3 scaling is a tensor
    factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    config = ModelConfig.from_dict(checkpoint.manifest["model"])
    np.testing.assert_array_equal(factors, np.float32(config.rope_freq_factors()))
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == "Q4_0" and types["blk.1.ffn_norm.weight"] == "F32"
    assert summary["bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert summary["tensors"] == len(reader.tensors)
    stored = sum(t.n_bytes for t in reader.tensors)
    weights = sum(t.n_elements for t in reader.tensors) - 16  # the factors are no weights
    assert summary["weights"] == weights and summary["bits_per_weight"] == 8 * stored / weights
    assert [event[0] for event in seen] == sorted(event[0] for event in seen)
    assert seen[-1][0] == seen[-1][1] == 2 * stored


def test_linear_rope_keys_and_tied_head(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama_linear_rope")
    keys = plan_gguf(checkpoint).entries
    assert keys["llama.rope.scaling.type"].value == "linear"
    assert keys["llama.rope.scaling.factor"].value == 2.0
    tied = plan_gguf(write_checkpoint(tmp_path / "tied", "smollm2"))
    assert "output.weight" not in [tensor.name for tensor in tied.tensors]


def test_body_decides_the_file_type(tmp_path):
    assert plan_gguf(write_checkpoint(tmp_path, "llama", "float16", "q8_0")).file_type.name == "MOSTLY_F16"


def test_source_general_keys_are_carried(tmp_path):
    """From GGUF to checkpoint to GGUF: general.* stays, except what the export decides."""
    checkpoint = write_checkpoint(tmp_path, "llama")
    export_gguf(checkpoint, tmp_path / "first.gguf", name="First")
    writer = gguf.GGUFWriter(tmp_path / "checkpoint/tokenizer/vocab.gguf", "other")
    for key, entry in read_entries(tmp_path / "first.gguf").items():
        if key.startswith("tokenizer."):
            writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "fr"])
    writer.add_size_label("900B")
    writer.add_quantized_by("somebody")
    writer.add_name("Original")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    checkpoint.manifest["model"]["name"] = ""
    keys = plan_gguf(checkpoint).entries
    assert keys["general.license"].value == b"apache-2.0"
    assert keys["general.languages"].value == [b"en", b"fr"]
    assert keys["general.name"].value == b"Original"
    assert keys["general.architecture"].value == "llama"
    assert keys["general.size_label"].value == "240K" and "general.quantized_by" not in keys


def test_exporting_an_exported_file_gives_the_same_weights(tmp_path):
    """The GGUF reader of this project undoes what the exporter did to the rows."""
    checkpoint = write_checkpoint(tmp_path, "llama_bias", "q5_1", "q5_0")
    export_gguf(checkpoint, tmp_path / "m.gguf")
    source = open_model(tmp_path / "m.gguf")
    layer = source.layer(1)
    for name in ("q_proj.weight", "k_proj.bias", "k_proj.weight", "down_proj.weight"):
        np.testing.assert_array_equal(layer[name].numpy(), checkpoint.weights(f"layers.1.{name}"))


@pytest.mark.parametrize(("rotation", "message"), [
    ({"applied": ["r4"]}, "says r4 and an R4 block of None; it is damaged"),
    ({"applied": ["r4"], "r4_block": 64}, "R4 block 64 is no power of two that divides 160"),
    ({"r3_block": 16}, "llama.cpp itself rotates K and V"),
])
def test_rotations_that_cannot_be_run_are_refused(rotation, message, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", rotation=rotation)
    refused(checkpoint, tmp_path, message)


def refused(checkpoint, tmp_path, message, **options):
    with pytest.raises(InputError, match=message):
        export_gguf(checkpoint, tmp_path / "m.gguf", **options)
    assert not list(tmp_path.glob("m.gguf*"))


def rewrite(checkpoint: QuantizedCheckpoint, changes: dict) -> QuantizedCheckpoint:
    """The checkpoint with tensors replaced, added, or (None) removed."""
    tensors = {name: checkpoint.get(name) for name in checkpoint.names} | changes
    tokenizer = (checkpoint.path / "tokenizer").rename(checkpoint.path.parent / "kept")
    with CheckpointWriter(checkpoint.path, overwrite=True) as writer:
        writer.write_shard("all", {name: tensor for name, tensor in tensors.items() if tensor is not None})
        path = writer.finish({"model": checkpoint.manifest["model"], "rotation": {}})
    tokenizer.rename(path / "tokenizer")
    return QuantizedCheckpoint(path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers.1.up_proj.weight": QuantizedTensor(
        grid_spec("int4-g32-sym"), np.zeros((160, 96), np.uint8), np.ones((160, 3), np.float32))},
     r"layers.1.up_proj.weight is on grid int4-g32-sym.*q4_0, q4_1, q5_0, q5_1, q8_0"),
    ({"lm_head.weight": None}, "not tied"),
    ({"layers.0.k_proj.weight": None}, r"layers.0.k_proj.weight should be \[32, 96\] and is nothing"),
    ({"layers.0.k_proj.weight": np.zeros((16, 96), np.float32)}, r"should be \[32, 96\] and is \[16, 96\]"),
    ({"layers.0.o_proj.bias": np.zeros(96, np.float32)}, "layers.0.o_proj.bias should be nothing"),
    ({"norm.weight": np.full(96, np.nan, np.float32)}, "norm.weight: wrong shape, NaN"),
    ({"layers.0.q_proj.weight": np.zeros((96, 96), np.float64)}, "is float64; floats must be"),
])
def test_inconsistent_tensors_are_refused(changes, message, tmp_path):
    refused(rewrite(write_checkpoint(tmp_path, "llama"), changes), tmp_path, message)


def test_tied_model_with_a_head_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama", changes={"tie_word_embeddings": True})
    refused(checkpoint, tmp_path, "lm_head.weight is there although")


def test_bias_that_llama_cpp_lacks_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "qwen3")
    checkpoint.manifest["model"]["extra"]["attention_bias"] = True
    sizes = {"q_proj": 128, "k_proj": 64, "v_proj": 64, "o_proj": 96}
    biases = {f"layers.{i}.{name}.bias": np.zeros(size, np.float32)
              for i in range(2) for name, size in sizes.items()}
    refused(rewrite(checkpoint, biases), tmp_path, "o_proj.bias: llama.cpp's qwen3 has no such bias")


def test_existing_output(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama")
    (tmp_path / "m.gguf").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists.*--overwrite"):
        export_gguf(checkpoint, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"mine"
    export_gguf(checkpoint, tmp_path / "m.gguf", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"
    with pytest.raises(InputError, match="exists"):
        export_gguf(checkpoint, tmp_path, overwrite=True)


def test_unwritable_output(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create .*file/m.gguf"):
        export_gguf(checkpoint, tmp_path / "file" / "m.gguf")


@pytest.mark.parametrize("limit", [None, 400_000])
def test_a_write_that_fails_leaves_nothing(limit, tmp_path):
    """A limit on the size of files: the write fails part-way, of one file or of the first of several."""
    checkpoint = write_checkpoint(tmp_path, "llama", "float32")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        refused(checkpoint, tmp_path, "cannot be written", split_max_size=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB; skips where none may be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_leaves_nothing(small_disk, tmp_path, monkeypatch):
    """Told before anything is written where free space says so, and when the disk fills up meanwhile."""
    checkpoint = write_checkpoint(tmp_path, "llama", "float32")
    with pytest.raises(StorageError, match="bytes are needed and .* are free"):
        export_gguf(checkpoint, small_disk / "m.gguf")
    plenty = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("optrot_edge.exporters.gguf.shutil.disk_usage", lambda _: plenty)
    for limit in (None, 300_000):
        with pytest.raises(StorageError, match="cannot be written: .*(No space left|the disk is full)"):
            export_gguf(checkpoint, small_disk / "m.gguf", split_max_size=limit)
        assert not list(small_disk.iterdir())


@pytest.mark.parametrize("share", [0.2, 0.9])  # while writing, while verifying
def test_interrupt_leaves_nothing(share, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama")

    def interrupt(done, total, what):
        if done > share * total:
            assert (tmp_path / "m.gguf.partial").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(checkpoint, tmp_path / "m.gguf", progress=interrupt)
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize(("name", "what"), [
    ("blk.0.attn_k.weight", "codes|scales"), ("blk.1.ffn_norm.weight", "values"),
    ("token_embd.weight", "values"), ("llama.rope.freq_base", "key llama.rope.freq_base")])
def test_verification_sees_one_flipped_bit(name, what, tmp_path):
    checkpoint = write_checkpoint(tmp_path, "llama")
    path = tmp_path / "m.gguf"
    export_gguf(checkpoint, path)
    plan = plan_gguf(checkpoint)
    verify_gguf(path, checkpoint, plan)
    reader = gguf.GGUFReader(path)
    offsets = {tensor.name: tensor.data_offset + tensor.n_bytes // 2 for tensor in reader.tensors}
    field = reader.fields["llama.rope.freq_base"]
    offsets["llama.rope.freq_base"] = field.offset + sum(part.nbytes for part in field.parts) - 1
    raw = bytearray(path.read_bytes())
    raw[offsets[name]] ^= 1
    path.write_bytes(raw)
    with pytest.raises(RuntimeError, match=what):
        verify_gguf(path, checkpoint, plan)


def test_needs_no_torch():
    code = "import sys, optrot_edge.exporters.gguf; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
