"""Memory: what is asked for, what goes to the disk, and that a deeper model takes no more."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from optrot_edge import memory, pipeline
from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.quantize.streams import Stream, embedded, native_chunks, picked_rows
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.rotation import Rotation
from tests.crashes import contents
from tests.road import save_model
from tests.tiny_models import random_tokens

FAST = {"optrot_steps": 3, "optrot_rows": 64, "plus_steps": 2, "nsamples": 16, "seqlen": 32}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")


@pytest.mark.parametrize(("text", "size"), [("8GiB", 2**33), ("800MB", 8 * 10**8), ("1.5 gib", 3 * 2**29),
                                            ("123", 123)])
def test_sizes(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "8 GiBs"])
def test_what_is_no_size(text):
    with pytest.raises(InputError, match="is no size; give bytes, or a number"):
        Recipe(max_memory=text)


def test_too_little_is_refused_before_any_work(tiny, text, tmp_path):
    fields = {"calibration": text, "max_memory": "100MB", **FAST}
    said = r"--max-memory 100MB is too little .* are needed \(torch .* MiB, embedding"
    with pytest.raises(InputError, match=said):
        pipeline.quantize(tiny("llama"), tmp_path / "c", **fields)
    with pytest.raises(InputError, match=said):
        pipeline.plan(tiny("llama"), **fields)
    assert list(tmp_path.iterdir()) == []


def test_the_share_of_a_control_group_counts(tiny, monkeypatch):
    """Where it is less than the machine's; "max" is no limit."""
    config, recipe = open_model(tiny("llama")).config, Recipe(nsamples=1000, rotation="none")
    machine = memory.os.sysconf("SC_PHYS_PAGES") * memory.os.sysconf("SC_PAGE_SIZE")
    for said, expected in (("max\n", machine), ("123456789\n", 123456789), (f"{2 * machine}\n", machine)):
        monkeypatch.setattr(memory.Path, "read_text", lambda self, said=said: said)
        assert memory.physical_memory() == expected
        assert memory.must_spill(config, recipe) == (expected < machine)


def test_when_streams_go_to_the_disk(tiny):
    config = open_model(tiny("llama")).config
    recipe = Recipe(nsamples=10**6, rotation="none")
    streams = 2 * 4 * 256 * 10**6 * config.hidden_size
    assert memory.stream_bytes(config, recipe) == streams
    needed = sum(memory.working_set(config, recipe).values())
    for limit, spilled in ((needed, True), (needed + streams - 1, True), (needed + streams, False)):
        assert memory.must_spill(config, dataclasses.replace(recipe, max_memory=str(limit))) is spilled
    assert memory.working_set(dataclasses.replace(config, num_hidden_layers=1000), recipe) == memory.working_set(
        config, recipe)


@pytest.mark.parametrize("fields", [{"rotation": "optrot"}, {"rotation": "optrot+"}, {"asymmetric": "none"}])
def test_on_the_disk_or_in_memory_the_bytes_are_the_same(fields, text, tmp_path, monkeypatch):
    model = save_model(tmp_path / "model", "llama")
    fields = {**FAST, "calibration": text, "rotation": "hadamard", **fields}
    pipeline.quantize(model, tmp_path / "plain", **fields)
    made = []

    class Watched(Stream):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self._file is not None)

    monkeypatch.setattr("optrot_edge.inputs.must_spill", lambda *_: True)
    monkeypatch.setattr("optrot_edge.quantize.streams.Stream", Watched)
    pipeline.quantize(model, tmp_path / "c", **fields)
    assert made and all(made)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


def test_the_limit_may_change_when_a_run_goes_on(text, tmp_path):
    model = save_model(tmp_path / "model", "llama")
    fields = {**FAST, "calibration": text, "rotation": "none"}

    def stop(name, done, total, note):
        if (name, done) == ("quantise layers", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, tmp_path / "c", progress=stop, max_memory="8GiB", **fields)
    pipeline.quantize(model, tmp_path / "c", max_memory="9GiB", **fields)
    pipeline.quantize(model, tmp_path / "plain", **fields)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


@pytest.mark.parametrize("on_disk", [False, True])
def test_streams(on_disk, tmp_path):
    stream = Stream(5, 3, 4, tmp_path if on_disk else None)
    parts = [torch.randn(windows.stop - windows.start, 3, 4) for windows in stream.batches(2)]
    for windows, part in zip(stream.batches(2), parts, strict=True):
        stream.write(windows, part)
    assert torch.equal(stream.read(slice(0, 5)), torch.cat(parts))
    assert torch.equal(stream.read(slice(3, 5)), torch.cat(parts)[3:])
    assert [(s.start, s.stop) for s in stream.batches(2, 1, 4)] == [(1, 3), (3, 4)]
    assert list(tmp_path.iterdir()) == []  # the file has no name
    stream.close()


def test_a_stream_that_does_not_fit_the_disk(tmp_path):
    with pytest.raises(InputError, match="cannot keep activations in"):
        Stream(2**20, 2**16, 2**10, tmp_path)


@pytest.mark.parametrize("case", ["llama", "smollm2"])
def test_matrices_in_chunks_are_the_matrices(case, tiny, monkeypatch):
    """Put together; and so are the rows of a text's tokens."""
    from optrot_edge.rotations.optrot import initial_rotation

    source = open_model(tiny(case))
    for rotation in (Rotation("none"), initial_rotation(source.config, {"r1"}, torch.Generator().manual_seed(0))):
        model = RotatedModel(source, rotation)
        assert torch.equal(torch.cat(list(model.chunks("embed_tokens.weight"))), model.embedding())
        if not model.config.tie_word_embeddings:
            assert torch.equal(torch.cat(list(model.chunks("lm_head.weight"))), model.lm_head())
    assert torch.equal(source.rows("embed_tokens.weight", 100, 200), source.embedding()[100:200])
    tokens = random_tokens(5, 9)
    stream = embedded(tokens, lambda ids: picked_rows(source.embedding().split(100), ids))
    assert torch.equal(stream.read(slice(0, 5)), source.embedding()[tokens])
    assert torch.equal(torch.cat(list(native_chunks(source))), source.embedding())


def test_rows_of_a_gguf(text, tmp_path):
    pipeline.export(save_model(tmp_path / "model", "smollm2"), tmp_path / "m.gguf", rotation="none", quantizer="rtn",
                    calibration="none")
    source = open_model(tmp_path / "m.gguf")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(source.rows(name, 100, 200), source.embedding()[100:200])


CHILD = """
import re, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from optrot_edge import pipeline
pipeline.quantize(sys.argv[1], sys.argv[2], calibration=sys.argv[3], nsamples=48, seqlen=64, rotation=sys.argv[4],
                  refits=0, plus_steps=1, max_memory=sys.argv[5])
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_a_deeper_model_takes_no_more_memory(rotation, text, tmp_path, monkeypatch):
    """Sixteen layers in the memory of four, within a twentieth; to hold all of them would take three tenths more.

    The two are compared with tensors given back as they are freed: what glibc keeps of them by itself differs by a
    tenth from run to run, whatever the depth. The limit holds with that too.
    """
    from tests import tiny_models

    peaks, streams = {}, 2 * 4 * 48 * 64 * 768
    given_back = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    for layers, allocator in ((4, given_back), (16, given_back), (16, {})):
        monkeypatch.setitem(tiny_models._VARIANTS, "deep", ("llama", {
            "hidden_size": 768, "intermediate_size": 1024, "num_attention_heads": 12, "head_dim": 64,
            "num_hidden_layers": layers}))
        model = save_model(tmp_path / f"m{layers}", "deep")
        config, recipe = open_model(model).config, Recipe(rotation=rotation, nsamples=48, seqlen=64, refits=0)
        limit = sum(memory.working_set(config, recipe).values()) + streams - 1  # the streams do not fit
        done = subprocess.run([sys.executable, "-c", CHILD, model, tmp_path / f"c{layers}-{len(allocator)}", text,
                               rotation, str(limit)], capture_output=True, text=True, check=False,
                              env={**os.environ, **allocator})
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout)
        assert peak < limit
        if allocator:
            peaks[layers] = peak
    weights = 16 * 768 * (2 * 768 + 2 * 128 + 3 * 1024)
    assert 12 / 16 * 4 * weights > 0.3 * peaks[4]  # the test would see them
    assert peaks[16] < 1.05 * peaks[4]
