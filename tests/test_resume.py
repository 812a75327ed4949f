"""Runs that are killed, stopped or tampered with: they go on to the same bytes, or say what is wrong."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from importlib import import_module

import pytest
import torch

from optrot_edge import fingerprint, pipeline
from optrot_edge.errors import InputError, StorageError
from optrot_edge.journal import JOURNAL, Lock
from optrot_edge.models.gguf_parts import part_path
from tests.crashes import KILLED, contents, in_child, kill_after, kill_at
from tests.road import save_model
from tests.rotations.test_optrot_plus import make_uneven

FAST = {"optrot_steps": 3, "optrot_rows": 64, "nsamples": 4, "seqlen": 32, "rotation": "optrot"}
AUTO = {"optrot_steps": 2, "optrot_rows": 64, "plus_steps": 2, "nsamples": 16, "seqlen": 32, "rotation": "auto"}
RTN = {"quantizer": "rtn", "calibration": "none", "rotation": "hadamard"}
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few",
                                        "ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny models with tokenizers, by case; do not write into them."""
    root = tmp_path_factory.mktemp("models")
    made = {case: make_uneven(save_model(root / case, case)) for case in ("llama", "smollm2", "tinyllama")}
    return made | {"one layer": save_model(root / "wide", "wide")}


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stop_at(stage: str, at: int):
    """A progress sink that interrupts there."""
    def progress(name, done, total, note):
        if (name, done) == (stage, at):
            raise KeyboardInterrupt
    return progress


def stopped(model, out, at: int = 1, **fields) -> None:
    """A run of `quantize` that is interrupted after `at` layers."""
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, out, progress=stop_at("quantise layers", at), **fields)
    assert out.with_name(out.name + ".partial").is_dir() and not out.exists()


# killed

def run_again(run, here, prepare=lambda: None) -> int:
    """Exit code of the same command once more. A run that was killed with all but its leftovers done is told so;
    these are gone then."""
    finished = (here / "out").exists() or part_path(here / "out", 0, 2).exists()
    done = finished and not list(here.rglob(JOURNAL)) and not list(here.rglob("*.optrot-replaced"))
    code = in_child(run, prepare)
    return 0 if done and code == 1 else code


def killed_until_done(run, delays, here) -> int:
    """Start `run` again and again, killed after each of `delays` in turn, then undisturbed; how often it was killed."""
    for kills, delay in enumerate(delays):
        code = run_again(run, here, kill_after(delay))
        assert code in (0, KILLED)
        if code == 0:
            return kills
    assert run_again(run, here) == 0, names(here)
    return len(delays)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "fields"), [("quantize", FAST), ("export", FAST), ("export", AUTO)],
                         ids=["quantize", "export", "export auto"])
def test_killed_at_random_moments(command, fields, models, text, tmp_path):
    """Twenty kills each, up to four in one run."""
    model, rng = models["tinyllama"], random.Random(command + fields["rotation"])

    def run(out):
        return lambda: getattr(pipeline, command)(model, out, calibration=text, **fields)

    (tmp_path / "plain").mkdir()
    began = time.monotonic()
    assert in_child(run(tmp_path / "plain" / "out")) == 0
    took, kills, attempt = time.monotonic() - began, 0, 0
    while kills < 20:
        here = tmp_path / str(attempt)
        here.mkdir()
        kills += killed_until_done(run(here / "out"), [rng.uniform(0, took) for _ in range(4)], here)
        assert contents(here) == contents(tmp_path / "plain")
        shutil.rmtree(here)
        attempt += 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["quantize", "overwrite", "export", "export split", "export with checkpoint",
                                  "export mlx", "export mlx overwrite", "export onnx", "export onnx overwrite"])
def test_killed_before_every_operation_on_the_disk(what, models, tmp_path):
    """Every moment at which what is on the disk changes; every third where only the last part of the road is another,
    and with ONNX, whose builder makes many files, every seventh."""
    model, arguments, overwrite = models["one layer"], dict(RTN), what.endswith("overwrite")
    arguments |= {"format": "mlx"} if "mlx" in what else {"format": "onnx"} if "onnx" in what else {}
    arguments |= {"split_max_size": 400_000} if "split" in what else {}
    if "onnx" in what:
        import_module("optrot_edge.exporters.onnx")  # once, not in every child
    command = pipeline.export if what.startswith("export") else pipeline.quantize

    def run(folder):
        kept = {"checkpoint": folder / "c"} if what.endswith("checkpoint") else {}
        return lambda: command(model, folder / "out", overwrite=overwrite, **kept, **arguments)

    def prepared(name):
        (tmp_path / name).mkdir()
        if overwrite:
            shutil.copytree(tmp_path / "old", tmp_path / name / "out")
        return tmp_path / name

    if overwrite:
        assert in_child(lambda: command(model, tmp_path / "old", **arguments | {"seed": 1})) == 0
    assert in_child(run(prepared("plain"))) == 0
    expected, number = contents(tmp_path / "plain"), 0
    while True:
        here = prepared(str(number))
        if in_child(run(here), kill_at(number)) == 0:
            break
        assert run_again(run(here), here) == 0, (number, names(here))
        assert contents(here) == expected, number
        shutil.rmtree(here)
        number += 7 if "onnx" in what else 1 if what in ("quantize", "export") else 3
    assert number > 20


# interrupted, and every kind of weight replayed

GRIDS = ["q4_0", "q4_1", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4", "int4-g32-sym",
         "mlx-4bit-g32", "f16"]


@pytest.mark.parametrize("kind", GRIDS)
def test_replayed_weights_give_the_same_bits(kind, tmp_path_factory, text, tmp_path):
    """What the next layers see are the stored codes decoded, of every grid, and floats before they are stored."""
    from tests.tiny_models import _BASE, _VARIANTS

    root = tmp_path_factory.getbasetemp() / "two wide layers"
    if not root.exists():
        _VARIANTS["wide2"] = ("llama", {**_VARIANTS["wide"][1], "num_hidden_layers": _BASE["num_hidden_layers"]})
        save_model(root, "wide2")
    fields = {"type": kind, "rotation": "hadamard", "calibration": text, "nsamples": 4, "seqlen": 32, "refits": 1}
    stopped(root, tmp_path / "c", **fields)
    pipeline.quantize(root, tmp_path / "c", **fields)
    pipeline.quantize(root, tmp_path / "plain", **fields)
    assert names(tmp_path) == ["c", "plain"]
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


@pytest.mark.parametrize("fields", [{"asymmetric": "none"}, {"asymmetric": "inputs"}, {"quantizer": "rtn"},
                                    {"quantizer": "rtn", "calibration": "none"}, {"rotate": "r1,r2,r3,r4",
                                                                                  "r4_block": 32}])
def test_every_calibration_resumes(fields, models, text, tmp_path):
    fields = {**FAST, "calibration": text, "embedding_type": "q4_0", **fields}
    model = models["llama"]
    for at in (1, 2):
        stopped(model, tmp_path / "c", at, **fields)
    pipeline.quantize(model, tmp_path / "c", **fields)
    pipeline.quantize(model, tmp_path / "plain", **fields)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


def test_nothing_is_learned_or_quantised_twice(models, text, tmp_path):
    fields, calls = {**FAST, "calibration": text}, []
    stopped(models["tinyllama"], tmp_path / "c", 2, **fields)
    kept = contents(tmp_path / "c.partial")
    layers = {f"{what}layer-0000{index}.safetensors" for what in ("", "inputs-") for index in (0, 1)}
    assert {"rotation.safetensors", "embedding.safetensors", *layers, JOURNAL} == set(kept)
    times = {name: (tmp_path / "c.partial" / name).stat().st_mtime_ns for name in kept}
    pipeline.quantize(models["tinyllama"], tmp_path / "c", progress=lambda *call: calls.append(call), **fields)
    assert "learn rotation" not in [call[0] for call in calls]
    for name in ("embedding.safetensors", *layers):
        assert (tmp_path / "c" / name).stat().st_mtime_ns == times[name]
    assert JOURNAL not in names(tmp_path / "c") and "rotation.safetensors" not in names(tmp_path / "c")


def test_a_rotation_made_before(models, text, tmp_path):
    """Given as an object, it counts by content."""
    from optrot_edge.rotations.rotation import Rotation

    fields = {**FAST, "calibration": text, "rotation": None}
    made = [pipeline.rotate(models["llama"], tmp_path / f"r{seed}", rotation="hadamard", seed=seed) for seed in (0, 1)]
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(models["llama"], tmp_path / "c", progress=stop_at("quantise layers", 1),
                          **fields | {"rotation": made[0]})
    with pytest.raises(InputError, match="settings: the rotation that was given has changed. Finish"):
        pipeline.quantize(models["llama"], tmp_path / "c", **fields | {"rotation": made[1]})
    pipeline.quantize(models["llama"], tmp_path / "c", **fields | {"rotation": Rotation.load(tmp_path / "r0")})
    pipeline.quantize(models["llama"], tmp_path / "plain", **fields | {"rotation": made[0]})
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


# refused

CHANGES = [({"seed": 1}, "--seed was 0, now it is 1"), ({"type": "q8_0"}, "--type was q4_0, now it is q8_0"),
           ({"damp": 0.2}, "--damp was 0.1, now it is 0.2"),
           ({"rotation": "none", "nsamples": 5},
            "--nsamples was 4, now it is 5; --rotation was optrot, now it is none")]


@pytest.mark.parametrize(("change", "said"), CHANGES)
def test_other_settings_are_refused_by_name(change, said, models, text, tmp_path):
    fields = {**FAST, "calibration": text}
    stopped(models["llama"], tmp_path / "c", **fields)
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"c.partial holds an unfinished run with other settings: .*{said}.*Finish it "
                                         "with the former settings, or start over with --restart"):
        pipeline.quantize(models["llama"], tmp_path / "c", overwrite=True, **fields | change)
    assert contents(tmp_path) == before
    pipeline.quantize(models["llama"], tmp_path / "c", restart=True, **fields | change)
    pipeline.quantize(models["llama"], tmp_path / "plain", **fields | change)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain") and names(tmp_path) == ["c", "plain"]


def test_other_inputs_are_refused_by_name(models, text, tmp_path, monkeypatch):
    model, words = shutil.copytree(models["llama"], tmp_path / "model"), tmp_path / "t.txt"
    shutil.copyfile(text, words)
    fields = {**FAST, "calibration": words}
    stopped(model, tmp_path / "c", **fields)

    def refused(said):
        with pytest.raises(InputError, match=f"other settings: {said}. Finish"):
            pipeline.quantize(model, tmp_path / "c", **fields)

    words.write_text(words.read_text() + " More.")
    refused("the calibration text has changed")
    shutil.copyfile(text, words)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    refused("the model's file model.safetensors has changed")
    (model / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as patch:
        patch.setattr("optrot_edge.rotating.versions", lambda: {"torch": "0.1"})
        with pytest.raises(InputError, match="torch was .*, now it is 0.1"):
            pipeline.quantize(model, tmp_path / "c", **fields)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        refused(r"threads was \d+, now it is 77 \(set OMP_NUM_THREADS\)")
    pipeline.quantize(model, tmp_path / "c", **fields)


def test_bad_input_in_a_first_run_leaves_nothing(models, text, tmp_path):
    """Found late, after a layer; in a run that was resumed what was there before stays."""
    fields = {**FAST, "calibration": text}

    def fail(name, done, total, note):
        if (name, done) == ("quantise layers", 2):
            raise InputError("no")

    with pytest.raises(InputError, match="no"):
        pipeline.quantize(models["llama"], tmp_path / "c", progress=fail, **fields)
    assert names(tmp_path) == []
    stopped(models["llama"], tmp_path / "c", **fields)
    with pytest.raises(InputError, match="no"):
        pipeline.quantize(models["llama"], tmp_path / "c", progress=fail, **fields)
    assert names(tmp_path) == ["c.partial"]


# damaged

@pytest.mark.parametrize("file", ["rotation", "embedding", "layer-00000", "layer-00001"])
@pytest.mark.parametrize("how", ["flip", "remove"])
def test_damaged_files_are_made_again(file, how, models, text, tmp_path):
    fields = {**FAST, "calibration": text}
    stopped(models["tinyllama"], tmp_path / "c", 2, **fields)
    path = tmp_path / "c.partial" / f"{file}.safetensors"
    data = path.read_bytes()
    path.unlink()
    if how == "flip":
        path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.warns(UserWarning, match=f"{file}.safetensors is damaged or missing; it and what followed"):
        pipeline.quantize(models["tinyllama"], tmp_path / "c", **fields)
    pipeline.quantize(models["tinyllama"], tmp_path / "plain", **fields)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


def test_a_damaged_or_foreign_journal_is_refused(models, text, tmp_path):
    fields = {**FAST, "calibration": text}
    stopped(models["llama"], tmp_path / "c", **fields)
    journal = tmp_path / "c.partial" / JOURNAL
    good = journal.read_text()
    journal.write_text(good[:100])
    with pytest.raises(InputError, match="journal.json is damaged .*; start over with --restart"):
        pipeline.quantize(models["llama"], tmp_path / "c", **fields)
    journal.write_text(json.dumps(json.loads(good) | {"format": 99}))
    with pytest.raises(InputError, match="begun by another version of optrot-edge"):
        pipeline.quantize(models["llama"], tmp_path / "c", **fields)
    journal.write_text(good)
    pipeline.quantize(models["llama"], tmp_path / "c", **fields)


def test_a_full_disk_keeps_the_layers(models, text, tmp_path, monkeypatch):
    from optrot_edge import resume

    fields, calls = {**FAST, "calibration": text}, []

    def full(path, tensors, file):
        calls.append(file)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(path, tensors, file)

    real = resume.save_shard
    with monkeypatch.context() as patch, pytest.raises(InputError, match="cannot be written: .*No space left"):
        patch.setattr(resume, "save_shard", full)
        pipeline.quantize(models["llama"], tmp_path / "c", **fields)
    assert "layer-00000.safetensors" in names(tmp_path / "c.partial")
    pipeline.quantize(models["llama"], tmp_path / "c", **fields)
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("write", ["tokenizer", "rotation"])
def test_a_full_disk_keeps_what_was_done(write, models, text, tmp_path, monkeypatch):
    """Wherever it is met, in a first run too."""
    fields = {**FAST, "calibration": text}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="No space left"):
        if write == "tokenizer":
            patch.setattr("optrot_edge.models.tokenizer_files.shutil.copyfile", full)
        else:
            patch.setattr("optrot_edge.rotations.rotation.save_file", full)
        pipeline.quantize(models["llama"], tmp_path / "c", **fields)
    assert names(tmp_path) == (["c.partial"] if write == "tokenizer" else [])  # nothing was done before the rotation
    pipeline.quantize(models["llama"], tmp_path / "c", **fields)
    assert names(tmp_path) == ["c"]


def test_what_is_complete_outlives_a_refused_package(models, tmp_path, monkeypatch):
    """Another option may package it without quantising again."""
    def refuse(*_, **__):
        raise InputError("too few parts")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="too few parts"):
        patch.setattr("optrot_edge.exporters.gguf.export_gguf", refuse)
        pipeline.export(models["llama"], tmp_path / "m.gguf", **RTN)
    assert names(tmp_path) == ["m.gguf.checkpoint.partial"]
    seen = []
    pipeline.export(models["llama"], tmp_path / "m.gguf", **RTN, split_max_size="1G",
                    progress=lambda name, *_: seen.append(name))
    assert names(tmp_path) == ["m.gguf"] and "quantise layers" not in seen


def test_a_refused_output_keeps_an_unfinished_run(models, text, tmp_path):
    """Of `export --overwrite`, killed, and given again without that."""
    out, fields = tmp_path / "m.gguf", {**FAST, "calibration": text}
    pipeline.export(models["llama"], out, **RTN)
    with pytest.raises(KeyboardInterrupt):
        pipeline.export(models["llama"], out, overwrite=True, progress=stop_at("quantise layers", 1), **fields)
    (tmp_path / "m.gguf.checkpoint.partial.lock").touch()  # as kill -9 leaves it
    kept = contents(tmp_path / "m.gguf.checkpoint.partial")
    with pytest.raises(InputError, match="exists; choose another --out or pass --overwrite"):
        pipeline.export(models["llama"], out, **fields)
    assert contents(tmp_path / "m.gguf.checkpoint.partial") == kept
    pipeline.export(models["llama"], out, overwrite=True, **fields)
    assert names(tmp_path) == ["m.gguf"]


# auto

def test_auto_resumes_within_an_arm_and_judges_none_twice(models, text, tmp_path):
    fields, model = {**AUTO, "calibration": text}, models["smollm2"]
    seen = []

    def second_arm(name, done, total, note):
        seen.append(name)
        if name == "quantise layers" and done == 1 and seen.count("arm") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, tmp_path / "c", progress=second_arm, **fields)
    work = tmp_path / "c.partial"
    assert "layer-00000.safetensors" in names(work / "arm-1") and "rotation.safetensors" in names(work / "arm-1")
    calls = []
    pipeline.quantize(model, tmp_path / "c", progress=lambda *call: calls.append(call[0]), **fields)
    assert calls.count("arm") == 2 and "learn rotation" not in calls and "collect inputs" not in calls
    assert calls.count("quantise layers") == 2
    pipeline.quantize(model, tmp_path / "plain", **fields)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


def test_a_chosen_arm_that_is_damaged_is_made_again(models, text, tmp_path):
    fields, model = {**AUTO, "calibration": text}, models["smollm2"]
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, tmp_path / "c", progress=stop_at("choose", 1), **fields)
    [path] = (tmp_path / "c.partial").glob("arm-*/layer-00001.safetensors")
    path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="layer-00001.safetensors is damaged"):
        pipeline.quantize(model, tmp_path / "c", **fields)
    pipeline.quantize(model, tmp_path / "plain", **fields)
    assert contents(tmp_path / "c") == contents(tmp_path / "plain")


# two at a time

def test_two_processes_do_not_write_in_one_folder(models, tmp_path):
    lock = Lock(tmp_path / "c.partial.lock")
    with pytest.raises(InputError, match=rf"another process \({os.getpid()}\) is writing c.partial; wait for it"):
        pipeline.quantize(models["llama"], tmp_path / "c", **RTN)
    lock.release()
    pipeline.quantize(models["llama"], tmp_path / "c", **RTN)
    assert names(tmp_path) == ["c"]


def test_the_lock_of_a_dead_process_holds_nobody_up(tmp_path):
    assert in_child(lambda: Lock(tmp_path / "x.lock")) == 0
    assert (tmp_path / "x.lock").is_file()
    Lock(tmp_path / "x.lock").release()
    assert names(tmp_path) == []


def test_the_fingerprint_names_what_shapes_a_result():
    """Fields that do not shape it are few, and named."""
    import dataclasses

    from optrot_edge.recipe import Recipe

    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert set(fingerprint.shaping_fields(Recipe(), "cpu")) == fields - set(fingerprint.NOT_SHAPING)
