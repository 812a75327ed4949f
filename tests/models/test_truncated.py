"""Files that this project wrote, cut off or damaged anywhere: said so, never a crash."""

from __future__ import annotations

import pytest
from hypothesis import given

from optrot_edge.errors import InputError
from optrot_edge.exporters.gguf import export_gguf
from optrot_edge.models import open_model
from optrot_edge.models.gguf_file import GGUFFile
from tests.exporters.gguf_models import write_checkpoint
from tests.models.test_reader_fuzz import FUZZ, damage, damages, read_everything

KINDS = {"q4_0": ("llama", "q4_0"), "iq4_nl": ("llama", "iq4_nl"), "mxfp4": ("llama", "mxfp4"),
         "q4_k": ("wide", "q4_k"), "q2_k": ("wide", "q2_k"), "f16": ("llama", "float16")}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(kind)`: bytes of a GGUF of that type, and how many of them are its header."""
    made = {}

    def of(kind: str) -> tuple[bytes, int]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            case, body = KINDS[kind]
            export_gguf(write_checkpoint(folder, case, body, body), folder / "m.gguf")
            header = min(info.offset for info in GGUFFile(folder / "m.gguf").tensors.values())
            made[kind] = (folder / "m.gguf").read_bytes(), header
        return made[kind]

    return of


def test_cut_off_at_any_byte(written, tmp_path):
    """Every byte around the places where something begins, and many others."""
    data, header = written("q4_0")
    path = tmp_path / "m.gguf"
    sizes = {*range(64), *range(0, header, 97), *range(header - 400, header + 40), *range(header, len(data), 4999),
             *range(len(data) - 40, len(data))}
    end = GGUFFile(_write(path, data))
    last = max(info.offset + info.row_bytes * info.shape[0] for info in end.tensors.values())
    for size in sorted(sizes):
        if size >= last:
            continue  # only padding is missing
        _write(path, data[:size])
        with pytest.raises(InputError, match="truncated" if size >= 24 else "truncated|not a GGUF") as caught:
            open_model(path)
        assert "m.gguf" in str(caught.value)


def _write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@FUZZ
@given(changes=damages())
def test_damaged_files_of_every_kind(written, tmp_path, kind, changes):
    data, header = written(kind)
    read_everything(_write(tmp_path / "m.gguf", damage(data, header, changes)), tmp_path)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    export_gguf(write_checkpoint(folder, "llama", "q8_0", "q8_0"), folder / "out" / "m.gguf", split_max_size=100_000)
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
@FUZZ
@given(changes=damages())
def test_damaged_parts(parts, tmp_path, number, changes):
    names = list(parts)
    for index, name in enumerate(names):
        _write(tmp_path / name, damage(parts[name], 3000, changes) if index == number else parts[name])
    read_everything(tmp_path / names[0], tmp_path)
