"""Checkpoints on disk: what is written is read back, damage is named, and failures leave nothing."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from optrot_edge.checkpoint import (
    GGUF_GRIDS,
    CheckpointWriter,
    QuantizedCheckpoint,
    QuantizedTensor,
    grid_spec,
)
from optrot_edge.errors import InputError

GRIDS = [*GGUF_GRIDS, "int2-g16-min", "int3-g32-zero", "int4-g32-sym", "int8-g64-zero"]
MANIFEST = {"model": {"num_hidden_layers": 1}, "rotation": {}, "errors": {}}


def random_tensor(grid: str, rows: int = 8, columns: int = 128) -> QuantizedTensor:
    """Random codes and parameters in the stored dtypes of `grid`."""
    spec, rng = grid_spec(grid), np.random.default_rng(0)
    codes = rng.integers(0, spec.levels, (rows, columns), dtype=np.uint8)
    shape = (rows, columns // spec.group_size)
    scales = rng.random(shape).astype(spec.scale_dtype)
    offsets = None
    if spec.kind == "min":
        offsets = (-rng.random(shape)).astype(spec.scale_dtype)
    elif spec.kind == "zero":
        offsets = rng.integers(0, spec.levels, shape, dtype=np.uint8)
    return QuantizedTensor(spec, codes, scales, offsets)


def write(path, tensors, **options):
    with CheckpointWriter(path, **options) as writer:
        for shard, content in tensors.items():
            writer.write_shard(shard, content)
        return writer.finish(MANIFEST)


@pytest.mark.parametrize("grid", GRIDS)
def test_round_trip(grid, tmp_path):
    tensor, plain = random_tensor(grid), np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4)
    path = write(tmp_path / "c", {"a": {"w": tensor}, "b": {"plain": plain}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    checkpoint = QuantizedCheckpoint(path)
    assert checkpoint.names == ["w", "plain"] and "w" in checkpoint and "v" not in checkpoint
    read = checkpoint.get("w")
    assert read.spec == grid_spec(grid)
    for ours, theirs in ((read.codes, tensor.codes), (read.scales, tensor.scales), (read.offsets, tensor.offsets)):
        if theirs is None:
            assert ours is None
            continue
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(checkpoint.get("plain"), plain)
    assert checkpoint.get("plain").dtype == np.float16 and checkpoint.weights("plain").dtype == np.float32
    np.testing.assert_array_equal(checkpoint.weights("w"), tensor.decode())


@pytest.mark.parametrize("grid", GRIDS)
def test_decoding_is_the_definition(grid):
    """Scalar by scalar, from the definition of the three kinds of grid."""
    tensor = random_tensor(grid, rows=2)
    spec, decoded = tensor.spec, tensor.decode()
    for i, j in np.ndindex(decoded.shape):
        code, scale = np.float32(tensor.codes[i, j]), np.float32(tensor.scales[i, j // spec.group_size])
        offset = None if tensor.offsets is None else np.float32(tensor.offsets[i, j // spec.group_size])
        value = {"symmetric": lambda c=code, s=scale, o=offset, h=2 ** (spec.bits - 1): (c - np.float32(h)) * s,
                 "min": lambda c=code, s=scale, o=offset: c * s + o,
                 "zero": lambda c=code, s=scale, o=offset: (c - o) * s}[spec.kind]()
        assert decoded[i, j] == value


@pytest.mark.parametrize("name", ["q3_k", "int9-g32-sym", "int4-g0-sym", "int4-g32-odd", ""])
def test_unknown_grids(name):
    with pytest.raises(InputError, match="unknown grid"):
        grid_spec(name)


@pytest.fixture
def saved(tmp_path):
    return write(tmp_path / "c", {"a": {"w": random_tensor("q4_1")}, "b": {"plain": np.ones(3, np.float32)}})


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
        writer.write_shard("a", {"w": random_tensor("q8_0")})
        assert list(tmp_path.iterdir())
        raise error
    assert not list(tmp_path.iterdir())


def test_an_error_keeps_the_old_checkpoint(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(saved, overwrite=True) as writer:
        writer.write_shard("z", {"w": random_tensor("q8_0")})
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
    path = write(tmp_path / "c", {"a": {"w": random_tensor("q4_0")}})
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
