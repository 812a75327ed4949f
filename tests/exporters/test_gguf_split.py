"""Split GGUF files: in real llama.cpp, read back, and never half there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import gguf
import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf import export_gguf, metadata_bytes
from optrot_edge.exporters.gguf_plan import plan_gguf
from optrot_edge.inspect import inspect_path
from optrot_edge.models import open_model
from optrot_edge.models.gguf_file import GGUFFile
from optrot_edge.packages import split_size
from optrot_edge.runtime.backends import size_on_disk
from optrot_edge.runtime.llama_cpp import LlamaCppBackend
from tests.exporters.gguf_models import write_checkpoint
from tests.exporters.test_gguf import check_logits

SPLIT_TYPES = {"split.no": "UINT16", "split.count": "UINT16", "split.tensors.count": "INT32"}  # as gguf-split's


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("split"), "llama3_rope", "q8_0", "float32")


def limit_of(checkpoint, room: int) -> int:
    """A limit that leaves `room` bytes for tensors beside the vocabulary."""
    return metadata_bytes(dataclasses.replace(plan_gguf(checkpoint), tensors=[])) + room


def keys(path) -> dict:
    return {key: (field.types[0].name, field.contents()) for key, field in gguf.GGUFReader(path).fields.items()
            if not key.startswith("GGUF.")}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.glob("m*"))


def test_leftovers_of_a_killed_export_stay_out(checkpoint, tmp_path):
    left = tmp_path / "m.gguf.partial" / "m-00001-of-00003.gguf"
    left.parent.mkdir()
    left.write_bytes(b"GGUF?")
    export_gguf(checkpoint, tmp_path / "m.gguf")
    assert names(tmp_path) == ["m.gguf"]


@pytest.fixture(scope="module")
def split(checkpoint, tmp_path_factory):
    """Path of the first of several parts."""
    out = tmp_path_factory.mktemp("parts") / "m.gguf"
    limit = limit_of(checkpoint, 270_000)
    summary = export_gguf(checkpoint, out, split_max_size=limit)
    files = sorted(out.parent.iterdir())
    assert summary["parts"] == len(files) > 2 and summary["path"] == str(files[0])
    assert [path.name for path in files] == [f"m-{i + 1:05d}-of-{len(files):05d}.gguf" for i in range(len(files))]
    assert all(path.stat().st_size <= limit for path in files)
    assert summary["bytes"] == sum(path.stat().st_size for path in files) == size_on_disk(files[0])
    return files[0]


def test_keys_are_those_of_gguf_split(checkpoint, split):
    parts = sorted(split.parent.iterdir())
    total = len(plan_gguf(checkpoint).tensors)
    for index, path in enumerate(parts):
        found = keys(path)
        numbers = {"split.no": index, "split.count": len(parts), "split.tensors.count": total}
        assert {key: found[key] for key in SPLIT_TYPES} == {
            key: (kind, numbers[key]) for key, kind in SPLIT_TYPES.items()}
        assert ("general.architecture" in found) == (index == 0)
        assert index == 0 or found.keys() == SPLIT_TYPES.keys()


def test_llama_cpp_loads_it_from_the_first_part(checkpoint, split):
    largest, spread = check_logits(checkpoint, split)
    assert spread < 0.03 and largest < 0.2


def test_first_part_without_tensors(checkpoint, tmp_path):
    """The vocabulary alone fills it, as with gguf-split's --no-tensor-first-split."""
    export_gguf(checkpoint, tmp_path / "m.gguf", split_max_size=263_000)
    first = min(tmp_path.glob("m-*"))
    assert not gguf.GGUFReader(first).tensors
    assert check_logits(checkpoint, first)[1] < 0.03


def test_reader_inspect_and_eval_take_the_first_part(checkpoint, split, tmp_path):
    source = open_model(split)
    np.testing.assert_array_equal(source.layer(1)["q_proj.weight"].numpy(),
                                  checkpoint.weights("layers.1.q_proj.weight"))
    np.testing.assert_array_equal(source.rows("lm_head.weight", 100, 110).numpy(),
                                  checkpoint.weights("lm_head.weight")[100:110])
    assert source.files == sorted(split.parent.iterdir())
    export_gguf(checkpoint, tmp_path / "whole.gguf")
    whole, parts = inspect_path(tmp_path / "whole.gguf"), inspect_path(split)
    assert parts["bytes"] == size_on_disk(split) and parts["parts"] == len(source.files)
    assert {**parts, "path": "", "bytes": 0, "parts": 1} == {**whole, "path": "", "bytes": 0}
    with LlamaCppBackend(split) as backend:
        assert backend.vocab_size == 512


def copied(split, folder):
    for path in split.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return sorted(folder.glob("m-*"))


def test_missing_part(split, tmp_path):
    parts = copied(split, tmp_path)
    parts[1].unlink()
    with pytest.raises(InputError, match=r"m-00002-of-\d{5}.gguf is missing: .* is part 1 of"):
        open_model(parts[0])


def test_another_part_than_the_first(split):
    parts = sorted(split.parent.iterdir())
    with pytest.raises(InputError, match="is part 2 of .*; give the first, .*m-00001-of-"):
        open_model(parts[1])


def test_parts_of_different_sets(split, tmp_path):
    parts = copied(split, tmp_path)
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(InputError, match=r"m-00003-of-\d{5}.gguf is not part 3 of"):
        open_model(parts[0])
    parts[2].write_bytes(third[:-3000])
    with pytest.raises(InputError, match=r"m-00003-of-\d{5}.gguf is truncated"):
        open_model(parts[0])
    parts[0].rename(tmp_path / "other.gguf")
    with pytest.raises(InputError, match=r"must end in -00001-of-\d{5}.gguf.*rename it"):
        open_model(tmp_path / "other.gguf")


def test_one_file_where_one_is_enough(checkpoint, tmp_path):
    summary = export_gguf(checkpoint, tmp_path / "m.gguf", split_max_size=split_size("2G"))
    assert summary["path"] == str(tmp_path / "m.gguf") and summary["parts"] == 1 and names(tmp_path) == ["m.gguf"]
    assert "split.count" not in GGUFFile(tmp_path / "m.gguf").entries


@pytest.mark.parametrize(("limit", "message"), [
    (10_000, "the vocabulary and other keys take"), (200_000, r"token_embd.weight alone takes 262,144 bytes")])
def test_limits_that_are_too_small(checkpoint, tmp_path, limit, message):
    with pytest.raises(InputError, match=message):
        export_gguf(checkpoint, tmp_path / "m.gguf", split_max_size=limit)
    assert names(tmp_path) == []


def test_sizes():
    assert split_size("2G") == 2 * 10**9 and split_size("500M") == 500 * 10**6 and split_size("1GiB") == 2**30
    with pytest.raises(InputError, match="is no size"):
        split_size("many")


def test_parts_are_not_replaced_unasked(checkpoint, split, tmp_path):
    parts = copied(split, tmp_path)
    with pytest.raises(InputError, match="m-00001-of-.* exists"):
        export_gguf(checkpoint, tmp_path / "m.gguf")
    export_gguf(checkpoint, tmp_path / "m.gguf", split_max_size=limit_of(checkpoint, 600_000), overwrite=True)
    left = sorted(tmp_path.glob("m*"))
    assert 1 < len(left) < len(parts) and len(open_model(left[0]).files) == len(left)
    export_gguf(checkpoint, tmp_path / "m.gguf", overwrite=True)
    assert names(tmp_path) == ["m.gguf"]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_interrupt_leaves_no_part(checkpoint, tmp_path, share):
    def interrupt(done, total, what):
        if done > share * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(checkpoint, tmp_path / "m.gguf", split_max_size=limit_of(checkpoint, 270_000), progress=interrupt)
    assert names(tmp_path) == []


def test_a_part_that_cannot_be_moved_takes_the_others_back(checkpoint, split, tmp_path):
    """A folder lies where the first part belongs, which is moved last."""
    (tmp_path / split.name).mkdir()
    (tmp_path / split.name / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists|cannot be written"):
        export_gguf(checkpoint, tmp_path / "m.gguf", split_max_size=limit_of(checkpoint, 270_000), overwrite=True)
    assert names(tmp_path) == [split.name] and (tmp_path / split.name / "mine").read_text() == "mine"


@pytest.mark.slow
def test_two_processes_at_once(checkpoint, tmp_path):
    """Of several exports to one path one wins, and what it leaves is whole."""
    code = ("import sys; from optrot_edge.checkpoint import QuantizedCheckpoint as C; from optrot_edge.exporters.gguf "
            "import export_gguf; export_gguf(C(sys.argv[1]), sys.argv[2], split_max_size=int(sys.argv[3]))")
    limit = str(limit_of(checkpoint, 270_000))
    runs = [subprocess.Popen([sys.executable, "-c", code, str(checkpoint.path), str(tmp_path / "m.gguf"), limit],
                             stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [run.communicate(timeout=120)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1]
    assert all("is writing m.gguf.partial" in text or "exists" in text for text, run in zip(said, runs, strict=True)
               if run.returncode)
    first = min(tmp_path.glob("m-*"))
    assert len(names(tmp_path)) == len(GGUFFile(first).files)
    assert check_logits(checkpoint, first)[1] < 0.03
