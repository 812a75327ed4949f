"""Both readers on damaged files: an InputError or a model, never another exception, a hang or a crash."""

import json
import math
import shutil
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from tests.tiny_gguf import write_gguf
from tests.tiny_models import save_tiny, save_tiny_tokenizer

FUZZ = settings(max_examples=100, deadline=None, database=None, derandomize=True,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
SECONDS = 5  # for a file that takes a hundredth of a second when it is whole


@st.composite
def damages(draw):
    """Where (as a fraction of the header or the file) and how bytes are changed or cut off."""
    place = st.tuples(st.sampled_from(["header", "header", "file"]), st.floats(0, 1, exclude_max=True))
    flip = st.tuples(st.just("flip"), place, st.integers(0, 7))
    write = st.tuples(st.just("write"), place, st.binary(min_size=1, max_size=8))
    cut = st.tuples(st.just("cut"), place, st.none())
    return draw(st.lists(st.one_of(flip, flip, write, cut), min_size=1, max_size=4))


def damage(data: bytes, header: int, changes) -> bytes:
    data = bytearray(data)
    for kind, (region, fraction), value in changes:
        if not data:
            break
        at = int(fraction * (min(header, len(data)) if region == "header" else len(data)))
        if kind == "flip":
            data[at] ^= 1 << value
        elif kind == "write":
            data[at:at + len(value)] = value
        else:
            del data[at:]
    return bytes(data)


def read_everything(path, folder) -> bool:
    """Whether the model could be read; only InputError may say that it could not."""
    start = time.process_time()
    try:
        source = open_model(path)
        tensors = [source.embedding(), source.final_norm(), source.lm_head()]
        for index in range(source.config.num_hidden_layers):
            tensors += source.layer(index).values()
        source.save_tokenizer(folder / "tokenizer")
    except InputError as error:
        assert str(error)
        return False
    finally:
        assert time.process_time() - start < SECONDS
    assert all(tensor is None or torch.isfinite(tensor).all() for tensor in tensors)
    assert all(math.isfinite(frequency) for frequency in source.config.rope_inv_freq())
    json.dumps(source.config.to_dict(), allow_nan=False)
    return True


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("fuzz") / "model", "smollm2")
    path = write_gguf(folder / "m.gguf", folder)
    return path, path.read_bytes().index(b"blk.1.ffn_norm.weight") + 100


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("fuzz") / "model", "qwen3", shards=True)
    return save_tiny_tokenizer(folder)


def copied(original, folder):
    """`folder` as a copy of `original`; made once per test, which damages the same file each time."""
    return folder if folder.exists() else shutil.copytree(original, folder)


@pytest.mark.slow
@FUZZ
@given(changes=damages())
def test_damaged_gguf(gguf_file, tmp_path, changes):
    original, header = gguf_file
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damage(original.read_bytes(), header, changes))
    read_everything(path, tmp_path)


@pytest.mark.slow
@FUZZ
@given(changes=damages())
def test_damaged_safetensors(hf_folder, tmp_path, changes):
    folder = copied(hf_folder, tmp_path / "model")
    shard = sorted(hf_folder.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    (folder / shard.name).write_bytes(damage(data, header, changes))
    read_everything(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@FUZZ
@given(changes=damages())
def test_damaged_json(hf_folder, tmp_path, name, changes):
    folder = copied(hf_folder, tmp_path / "model")
    data = (hf_folder / name).read_bytes()
    (folder / name).write_bytes(damage(data, len(data), changes))
    read_everything(folder, tmp_path)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2, 700), st.floats(), st.sampled_from([
    2**31, 10**400, "", "llama3", "linear", "default", "llama", "mistral", "qwen2", "x" * 300]))
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings"]
VALUES = st.one_of(SCALARS, st.lists(SCALARS, max_size=3),
                   st.dictionaries(st.sampled_from(ROPE_KEYS), SCALARS, max_size=5))


@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_foreign_values_in_the_config(hf_folder, tmp_path, data):
    folder = copied(hf_folder, tmp_path / "model")
    config = json.loads((hf_folder / "config.json").read_text())
    keys = [*config, "rope_scaling", "rope_theta", "quantization_config", "use_sliding_window",
            "sliding_window", "partial_rotary_factor"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        config[key] = data.draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    read_everything(folder, tmp_path)


def test_undamaged_files_are_read(gguf_file, hf_folder, tmp_path):
    assert read_everything(gguf_file[0], tmp_path)
    assert read_everything(hf_folder, tmp_path)
