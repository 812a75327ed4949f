"""Checkpoints on disk: what is written is read back, damage is named, and failures leave nothing."""

from __future__ import annotations

import dataclasses
import json
import resource

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optrot_edge.checkpoint import (
    GGUF_GRIDS,
    CheckpointWriter,
    QuantizedCheckpoint,
    grid_spec,
)
from optrot_edge.errors import InputError
from optrot_edge.gridspec import decode_scales, encode_scales
from tests.stored_tensors import random_tensor

GRIDS = [*GGUF_GRIDS, "int2-g16-min", "int3-g32-zero", "int4-g32-sym", "int8-g64-zero", "mlx-4bit-g64",
         "mlx-3bit-g32-bf16", "mlx-8bit-g128-f32"]
MANIFEST = {"model": {"num_hidden_layers": 1}, "rotation": {}, "errors": {}}


def write(path, tensors, **options):
    with CheckpointWriter(path, **options) as writer:
        for shard, content in tensors.items():
            writer.write_shard(shard, content)
        return writer.finish(MANIFEST)


@pytest.mark.parametrize("grid", GRIDS)
def test_round_trip(grid, tmp_path):
    tensor, plain = random_tensor(grid, 8, 4), np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4)
    path = write(tmp_path / "c", {"a": {"w": tensor}, "b": {"plain": plain}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    checkpoint = QuantizedCheckpoint(path)
    assert checkpoint.names == ["w", "plain"] and "w" in checkpoint and "v" not in checkpoint
    read = checkpoint.get("w")
    assert read.spec == grid_spec(grid)
    ours, theirs = read.parts(), tensor.parts()
    assert ours.keys() == theirs.keys()
    for name, part in theirs.items():
        assert ours[name].dtype == part.dtype
        np.testing.assert_array_equal(ours[name], part)
    np.testing.assert_array_equal(checkpoint.get("plain"), plain)
    assert checkpoint.get("plain").dtype == np.float16 and checkpoint.weights("plain").dtype == np.float32
    np.testing.assert_array_equal(checkpoint.weights("w"), tensor.decode())


@pytest.mark.parametrize("grid", GRIDS)
def test_decoding_is_the_definition(grid):
    """Scalar by scalar, from the definition of the kinds of grid, in float32."""
    tensor = random_tensor(grid, 2, 2)
    spec, decoded = tensor.spec, tensor.decode()
    scales = decode_scales(tensor.scales, spec.scale_dtype)
    for i, j in np.ndindex(decoded.shape):
        block, group, code = j // spec.block_size, j // spec.group_size, tensor.codes[i, j]
        scale, offset = scales[i, block], None
        if spec.kind == "min":
            offset = decode_scales(tensor.offsets, spec.scale_dtype)[i, block]
        elif spec.kind == "zero":
            offset = np.float32(tensor.offsets[i, block])
        if spec.subscales:
            scale = scale * np.float32(tensor.subscales[i, group])
            offset = None if offset is None else -(offset * np.float32(tensor.suboffsets[i, group]))
        value = {"symmetric": lambda q: (np.float32(q) - np.float32(2 ** (spec.bits - 1))) * scale,  # noqa: B023
                 "codebook": lambda q: np.float32(spec.codebook[q]) * scale,  # noqa: B023
                 "min": lambda q: np.float32(q) * scale + offset,  # noqa: B023
                 "zero": lambda q: (np.float32(q) - offset) * scale}[spec.kind](code)  # noqa: B023
        assert decoded[i, j] == value


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "e8m0"])
def test_stored_scales_decode_to_what_was_encoded(dtype):
    values = np.float32(2.0) ** np.arange(-127, 128)
    if dtype == "float16":
        values = values[(values >= 2.0**-24) & (values < 2.0**16)]
    stored = encode_scales(values, dtype)
    np.testing.assert_array_equal(decode_scales(stored, dtype), values)
    if dtype == "e8m0":
        assert stored.tolist() == list(range(255))
    elif dtype != "float16":
        odd = np.float32([0.0, -0.0, -1.0078125, 3.140625, 1e-38])
        odd = odd if dtype == "float32" else (odd.view(np.uint32) & 0xFFFF0000).view(np.float32)
        np.testing.assert_array_equal(decode_scales(encode_scales(odd, dtype), dtype).view(np.uint32),
                                      odd.view(np.uint32))


@pytest.mark.parametrize(("name", "bits"), [
    ("q2_k", 2.625), ("q3_k", 3.4375), ("q4_k", 4.5), ("q5_k", 5.5), ("q6_k", 6.5625), ("iq4_nl", 4.5),
    ("iq4_xs", 4.25), ("mxfp4", 4.25), ("q4_0", 4.5), ("q5_1", 6.0), ("mlx-4bit-g64", 4.5), ("mlx-4bit-g64-f32", 5.0),
    ("mlx-3bit-g32-bf16", 4.0), ("int4-g32-zero", 5.125)])
def test_bits_per_weight(name, bits):
    assert grid_spec(name).bits_per_weight == bits


@pytest.mark.parametrize("name", ["q3_k_m", "q1_k", "mlx-7bit-g64", "mlx-4bit-g16", "mlx-4bit-g64-f64",
                                  "int9-g32-sym", "int4-g0-sym", "int4-g32-odd", ""])
def test_unknown_grids(name):
    with pytest.raises(InputError, match="unknown grid"):
        grid_spec(name)


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "c", {"a": {"w": random_tensor("q4_1", 8, 4)}, "b": {"plain": np.ones(3, np.float32)}})


def test_missing_and_truncated_shards(saved):
    shard = saved / "a.safetensors"
    content = shard.read_bytes()
    for damaged in (content[: len(content) // 2], content[:5], b""):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match="a.safetensors is missing or damaged.*quantise again"):
            QuantizedCheckpoint(saved).get("w")
    shard.unlink()
    with pytest.raises(InputError, match="a.safetensors is missing or damaged"):
        QuantizedCheckpoint(saved).weights("w")
    np.testing.assert_array_equal(QuantizedCheckpoint(saved).get("plain"), 1)


@pytest.mark.parametrize("change", [
    {"w.codes": np.zeros((8, 64), np.uint8)}, {"w.scales": np.zeros((8, 3), np.float16)},
    {"w.scales": np.zeros((8, 4), np.float32)}, {"w.mins": np.zeros((4, 8), np.float16)}, {"w.mins": None}])
def test_a_shard_that_contradicts_the_manifest(saved, change):
    tensors = load_file(saved / "a.safetensors") | change
    save_file({k: v for k, v in tensors.items() if v is not None}, saved / "a.safetensors")
    with pytest.raises(InputError, match="damaged"):
        QuantizedCheckpoint(saved).get("w")


def edit(saved, **changes):
    manifest = json.loads((saved / "optrot.json").read_text()) | changes
    (saved / "optrot.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("grid", "change"), [
    ("q4_k", {"subscales": np.full((2, 8), 64, np.uint8)}), ("q4_k", {"subscales": None}),
    ("q2_k", {"suboffsets": np.zeros((2, 8), np.uint8)}), ("q3_k", {"subscales": np.zeros((2, 16), np.uint8)}),
    ("q6_k", {"scales": np.zeros((2, 16), np.float16)}), ("mxfp4", {"codes": np.full((2, 256), 15, np.uint8)}),
    ("iq4_xs", {"codes": np.zeros((2, 255), np.uint8)}),
    ("mlx-4bit-g64-bf16", {"scales": np.zeros((2, 4), np.float16)})])
def test_damage_in_a_grid_of_two_levels(grid, change, tmp_path):
    good = random_tensor(grid, 2, 256 // grid_spec(grid).block_size)
    path = write(tmp_path / "c", {"a": {"w": dataclasses.replace(good, **change)}})
    with pytest.raises(InputError, match="w is damaged|is missing or damaged"):
        QuantizedCheckpoint(path).get("w")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_format_versions(saved, version):
    edit(saved, format_version=version)
    with pytest.raises(InputError, match="format_version is not 1"):
        QuantizedCheckpoint(saved)


@pytest.mark.parametrize("entry", [{}, {"file": "a.safetensors"}, {"file": "a.safetensors", "shape": 3, "dtype": 1},
                                   {"file": "a.safetensors", "shape": [8, 128], "grid": "q4_1", "dtype": None}])
def test_malformed_entries(saved, entry):
    edit(saved, tensors={"v": entry})
    with pytest.raises(InputError, match="damaged"):
        QuantizedCheckpoint(saved).get("v")


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe"])
def test_unreadable_manifest(saved, content):
    (saved / "optrot.json").write_bytes(content)
    with pytest.raises(InputError, match="optrot.json"):
        QuantizedCheckpoint(saved)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InputError, match="no optrot.json; not a quantised checkpoint"):
            QuantizedCheckpoint(path)


def test_unknown_tensor(saved):
    with pytest.raises(InputError, match="no tensor 'v'"):
        QuantizedCheckpoint(saved).get("v")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), CheckpointWriter(tmp_path / "c") as writer:
        writer.write_shard("a", {"w": random_tensor("q8_0", 8, 4)})
        assert list(tmp_path.iterdir())
        raise error
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_old_checkpoint(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(saved, overwrite=True) as writer:
        writer.write_shard("z", {"w": random_tensor("q8_0", 8, 4)})
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["c"]


def test_a_manifest_with_nan_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON"), CheckpointWriter(tmp_path / "c") as writer:
        writer.finish({"errors": {"snr_db": float("nan")}})
    assert not list(tmp_path.iterdir())


def test_overwriting(saved):
    with pytest.raises(InputError, match="exists; choose another --out or pass --overwrite"):
        CheckpointWriter(saved)
    write(saved, {"other": {"x": np.zeros(2, np.float32)}}, overwrite=True)
    assert QuantizedCheckpoint(saved).names == ["x"]
    assert sorted(path.name for path in saved.iterdir()) == ["optrot.json", "other.safetensors"]
    assert [path.name for path in saved.parent.iterdir()] == ["c"]


def test_overwriting_spares_what_is_no_checkpoint(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    (tmp_path / "file").write_text("mine")
    for name in ("home", "file"):
        with pytest.raises(InputError, match="is no checkpoint"):
            CheckpointWriter(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "letter").read_text() == "dear" and (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert QuantizedCheckpoint(write(tmp_path / "empty", {}, overwrite=True)).names == []


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "c.partial" / "old.safetensors").write_text("")
    path = write(tmp_path / "c", {"a": {"w": random_tensor("q4_0", 8, 4)}})
    assert sorted(p.name for p in path.iterdir()) == ["a.safetensors", "optrot.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_unwritable_output(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create .*file/c: Not a directory"):
        CheckpointWriter(tmp_path / "file" / "c")


def test_full_disk(tmp_path):
    """A limit on the size of files stands in for the full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(InputError, match="c cannot be written"):
            write(tmp_path / "c", {"a": {"w": np.zeros(9000, np.float32)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
