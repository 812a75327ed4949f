"""The whole comparison on a tiny model: its rows, what is left, going on after a stop, refusals."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from optrot_edge import pipeline
from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.compare.comparison import compare
from optrot_edge.compare.run import Comparison
from optrot_edge.compare.tables import tables
from optrot_edge.errors import InputError
from optrot_edge.journal import JOURNAL, Journal, Lock
from optrot_edge.models import open_model
from optrot_edge.plan import stored_bytes
from optrot_edge.recipe import Recipe
from optrot_edge.rotations.rotation import Rotation
from optrot_edge.runtime.evaluate import score_windows, tokenize_for
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.cli_runner import left
from tests.compare.conftest import ALL, FIELDS, SHAPE, options
from tests.crashes import KILLED, contents, in_child, kill_after, kill_at

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few",
                                        "ignore:.*use of fork:DeprecationWarning", "ignore:.*read the same text")


def test_every_combination_is_a_measured_row(made):
    _, found = made
    rows = {(row["arm"], row["bits"], row["quantizer"], row["online"], row["activations"]) for row in found["rows"]}
    wanted = itertools.product(ALL, (4, 3), ("gptq", "rtn"), (False,), found["lists"]["activations"])
    assert rows == set(wanted) and len(rows) == len(found["rows"])
    for row in found["rows"]:
        assert row["status"] == "measured" and row["kl_mean"] > 0 and row["kl_se"] > 0 and len(row["window_kl"]) == 3
        assert row["ppl"] > 1 and 0 <= row["top1"] <= 1 and row["nonfinite"] == 0 and row["not_reproduced"] is None
        assert row["snr_db"] > 0
        assert (row["learning"] is None) == (row["arm"] in ("none", "hadamard"))
    kl = {row["name"]: row["kl_mean"] for row in found["rows"]}
    assert len(set(kl.values())) == len(kl) * 4 / 5  # top-50 is all of 14 matrices
    for arm in ALL:
        assert kl[f"{arm}-w3-gptq-a16"] > kl[f"{arm}-w4-gptq-a16"]


@pytest.mark.parametrize("arm", ["none", "optrot"])
@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_a_row_is_what_the_commands_give_one_by_one(arm, quantizer, uneven, made, text, words, tmp_path):
    """`rotate`, `quantize` and an evaluation with the same settings."""
    row = next(row for row in made[1]["rows"] if row["name"] == f"{arm}-w3-{quantizer}-a16")
    rotation = "none"
    if arm != "none":
        rotation = tmp_path / "r.safetensors"
        pipeline.rotate(uneven, rotation, rotation=arm, calibration=text, **FIELDS)
    fields = {**FIELDS, "calibration": text if quantizer == "gptq" else "none", "quantizer": quantizer,
              "type": "int3-g32-zero", "embedding_type": "f16", "head_type": "f16", "asymmetric": "none", "refits": 0}
    path = pipeline.quantize(uneven, tmp_path / "c", rotation=rotation, **fields)
    tokens = tokenize_for(uneven, None, Path(words).read_text(), SHAPE["window"], SHAPE["windows"])
    summary = score_windows(TorchBackend(path), TorchBackend(uneven), tokens).summary()
    for name in ("kl_mean", "kl_se", "ppl", "top1"):
        assert row[name] == pytest.approx(summary[name], rel=1e-6), name
    assert made[1]["reference"]["ppl"] == pytest.approx(summary["ppl_reference"])
    source = open_model(uneven)
    held = Rotation("none") if arm == "none" else Rotation.load(rotation)
    recipe = Recipe(**fields | {"rotation": "none"})
    assert row["bytes"] == stored_bytes(source, held, recipe)
    assert set(QuantizedCheckpoint(path).manifest["recipe"]) >= {"type"}


@pytest.mark.parametrize("grid", ["min", "sym"])
def test_other_grids(grid, uneven, text, words, tmp_path):
    row, = run(uneven, words, text, tmp_path / "out", grid=grid, rotations=["none"], quantizers=["rtn"],
               mu_h=False)["rows"]
    path = pipeline.quantize(uneven, tmp_path / "c", rotation="none", quantizer="rtn", calibration="none",
                             type=f"int4-g32-{grid}", embedding_type="f16", head_type="f16")
    tokens = tokenize_for(uneven, None, Path(words).read_text(), SHAPE["window"], SHAPE["windows"])
    summary = score_windows(TorchBackend(path), TorchBackend(uneven), tokens).summary()
    assert row["kl_mean"] == pytest.approx(summary["kl_mean"], rel=1e-6)


def test_what_is_left(made):
    out, found = made
    rotations = {f"{row['rotation']}.safetensors" for row in found["rows"] if row["arm"] != "none"}
    assert left(out) == ["figures", "index.html", JOURNAL, "results.csv", "results.json", "results.md", "rotations"]
    assert set(left(out / "rotations")) == rotations and len(rotations) == 5
    assert left(out.parent) == ["out"]
    assert json.loads((out / "results.json").read_text()) == found
    assert Rotation.load(out / "rotations" / "optrot.safetensors").applied == ["r1", "r2"]


def test_with_online_rotations(uneven, words, text, tmp_path):
    """The unrotated model, in which none runs, is measured once and stands in both tables."""
    found = compare(uneven, tmp_path / "out", text=words, **options(text, online="both", quantizers=["rtn"]))
    assert [row["name"] for row in found["rows"]] == ["none-w4-rtn-a16", "hadamard-w4-rtn-a16",
                                                      "hadamard-w4-rtn-online-a16"]
    assert [[row["name"] for row in table["rows"]] for table in tables(found)] == [
        ["none-w4-rtn-a16", name] for name in ("hadamard-w4-rtn-a16", "hadamard-w4-rtn-online-a16")]
    online = Rotation.load(tmp_path / "out" / "rotations" / "hadamard-online.safetensors")
    assert online.applied == ["r1", "r2", "r3", "r4"] and online.r4_block == 32
    drawn = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"mu-w.png", "mu-w-online.png", "snr-w4-rtn.png", "bound-w4-rtn-online.png"} <= drawn
    page = (tmp_path / "out" / "index.html").read_text()
    assert "with online R3 and R4" in page and "without online R3 and R4" in page


def run(uneven, words, text, out, **changes):
    return compare(uneven, out, text=words, **options(text, **changes))


def stop_at(stage: str, at: int, times: int = 1):
    """A progress sink that interrupts at the `times`th such call."""
    left = [times]

    def progress(name, done, total, note):
        if (name, done) == (stage, at):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
    return progress


@pytest.mark.parametrize(("stage", "at", "times", "measured"), [
    ("compare", 1, 1, 1), ("quantise layers", 1, 1, 0), ("measure matrices", 1, 2, 1), ("quantise layers", 1, 2, 1),
    ("measure errors", 2, 2, 1), ("evaluate", 2, 2, 1), ("learn rotation", 2, 1, 1)])
def test_it_goes_on_where_it_was(stage, at, times, measured, uneven, words, text, tmp_path):
    """Between two rows and inside one; nothing that was finished is made again."""
    lists = {"rotations": ["none", "optrot"], "fields": {"optrot_rows": 0}}
    run(uneven, words, text, tmp_path / "plain", **lists)
    with pytest.raises(KeyboardInterrupt):
        run(uneven, words, text, tmp_path / "out", progress=stop_at(stage, at, times), **lists)
    journal = Journal.load(tmp_path / "out")
    assert sum(name.startswith("row ") for name in journal.entries) == measured
    calls = []
    run(uneven, words, text, tmp_path / "out", progress=lambda *call: calls.append(call), **lists)
    before, now = list(journal.entries), [call[0] for call in calls]
    assert [call[3] for call in calls if call[0] == "evaluate"] == ["none-w4-gptq-a16"] * 0 ** measured * 5 + [
        "optrot-w4-gptq-a16"] * 5
    if "rotations/optrot.safetensors" in before:
        assert "learn rotation" not in now
    done = sum(call[:2] == ("quantise layers", 1) for call in calls)
    resumed = stage == "quantise layers"  # its first layer is read back, and reported again
    assert done == 2 - measured - (stage in ("measure errors", "evaluate")) or resumed
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert left(tmp_path) == ["out", "plain"]


@pytest.mark.slow
def test_killed_at_random_moments(uneven, words, text, tmp_path):
    lists = {"rotations": ["none", "optrot"], "quantizers": ["gptq", "rtn"]}
    began = time.monotonic()
    assert in_child(lambda: run(uneven, words, text, tmp_path / "plain", **lists)) == 0
    took, kills = time.monotonic() - began, 0
    for share in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0):
        code = in_child(lambda: run(uneven, words, text, tmp_path / "out", **lists), kill_after(share * took))
        assert code in (0, KILLED)
        kills += code == KILLED
    assert in_child(lambda: run(uneven, words, text, tmp_path / "out", **lists)) == 0
    assert kills > 2
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


@pytest.mark.slow
def test_killed_before_operations_on_the_disk(uneven, words, text, tmp_path):
    """Every fifth moment at which what is on the disk changes."""
    lists = {"rotations": ["hadamard"], "quantizers": ["rtn"], "mu_h": False}
    assert in_child(lambda: run(uneven, words, text, tmp_path / "plain", **lists)) == 0
    for number in itertools.count(0, 5):
        out = tmp_path / "out"
        if in_child(lambda out=out: run(uneven, words, text, out, **lists), kill_at(number)) == 0:
            break
        assert in_child(lambda out=out: run(uneven, words, text, out, **lists)) == 0, number
        assert contents(out) == contents(tmp_path / "plain"), number
        shutil.rmtree(out)
    assert number > 20


def test_lists_may_grow_and_nothing_is_measured_twice(uneven, words, text, tmp_path):
    first = run(uneven, words, text, tmp_path / "out", rotations=["hadamard"])
    calls = []
    second = run(uneven, words, text, tmp_path / "out", rotations=["none", "hadamard"], quantizers=["gptq", "rtn"],
                 progress=lambda *call: calls.append(call))
    assert first["rows"][0] in second["rows"] and len(second["rows"]) == 4
    assert {call[3] for call in calls if call[0] == "evaluate"} == {row["name"] for row in second["rows"]} - {
        "hadamard-w4-gptq-a16"}


def test_texts_may_be_moved(uneven, words, text, copied, made, tmp_path):
    moved = [shutil.copy(file, tmp_path) for file in (words, text)]
    out, calls = copied(made[0]), []
    found = run(uneven, *moved, out, progress=lambda *call: calls.append(call))
    assert all(row["status"] == "measured" for row in found["rows"])
    assert not [call for call in calls if call[0] == "evaluate"]


@pytest.mark.parametrize(("changes", "says"), [
    ({"fields": {"damp": 0.1}}, "--damp was 0.01, now it is 0.1"),
    ({"fields": {"seed": 1}}, "--seed was 0, now it is 1"),
    ({"group_size": 16}, "--group-size was 32, now it is 16"),
    ({"grid": "sym"}, "--grid was zero, now it is sym"),
    ({"windows": 2}, "--windows was 3, now it is 2"),
    ({"fields": {"calibration": "builtin"}}, "the calibration text has changed"),
])
def test_other_settings_are_refused(changes, says, uneven, words, text, copied, made):
    out = copied(made[0])
    before = contents(out)
    with pytest.raises(InputError, match=says):
        run(uneven, words, text, out, **changes)
    assert contents(out) == before


def test_another_evaluation_text_is_refused_unless_it_starts_over(uneven, words, text, copied, made):
    out = copied(made[0])
    with pytest.raises(InputError, match="--text was .* --restart"):
        run(uneven, text, text, out)
    (out / "notes.txt").write_text("keep")
    with pytest.warns(UserWarning, match="the same text"):
        found = run(uneven, text, text, out, rotations=["none"], restart=True)
    assert len(found["rows"]) == 1 and not (out / "rotations").exists()
    assert (out / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(("changes", "says"), [
    ({"rotations": ["none", "quarot"]}, "--rotations quarot: use none, hadamard, optrot"),
    ({"rotations": []}, "--rotations"),
    ({"bits": [4, 9]}, "--bits 9: use 2, 3"),
    ({"quantizers": ["awq"]}, "--quantizers awq: use gptq, rtn"),
    ({"activations": [5]}, "--activations 5: use 16, 8, 4"),
    ({"online": "maybe"}, "--online maybe: use no, yes, both"),
    ({"grid": "q4_0"}, "--grid q4_0: use zero, min, sym"),
    ({"group_size": 64}, "rows of 96 weights do not divide"),
    ({"group_size": 0}, "--group-size 0"),
    ({"max_minutes": 0}, "--max-minutes 0"),
    ({"window": 300}, "--window 300 exceeds the model's context of 256"),
    ({"windows": 10**6}, "windows"),
    ({"fields": {"calibration": "none"}}, "--calibration none"),
    ({"fields": {"rotate": "r1,r4"}}, "for r3 and r4 use --online"),
    ({"fields": {"seqlen": 500}}, "--seqlen 500 exceeds"),
    ({"fields": {"nsamples": 10**6}}, "--nsamples"),
    ({"fields": {"damp": 2.0}}, "--damp"),
])
def test_bad_input_leaves_nothing(changes, says, uneven, words, text, tmp_path):
    with pytest.raises(InputError, match=says):
        run(uneven, words, text, tmp_path / "out", **changes)
    assert left(tmp_path) == []


def test_other_folders_and_other_processes_are_refused(uneven, words, text, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("keep")
    with pytest.raises(InputError, match="mine exists and is no comparison"):
        run(uneven, words, text, tmp_path / "mine")
    Journal(tmp_path / "mine", {"recipe": {}}).save()
    with pytest.raises(InputError, match="another command's unfinished work"):
        run(uneven, words, text, tmp_path / "mine", restart=True)
    assert (tmp_path / "mine" / "file").read_text() == "keep"
    lock = Lock(tmp_path / "out.lock")
    try:
        with pytest.raises(InputError, match="another process .* is writing out"):
            run(uneven, words, text, tmp_path / "out")
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with pytest.raises(InputError, match="another process .* is writing out"):
            run(uneven, words, text, tmp_path / "link")
    finally:
        lock.release()


def test_what_a_killed_run_left_of_a_comparison(uneven, words, text, copied, made, tmp_path):
    """Of one that had just begun nothing is worth a word; of another, or with a damaged journal, --restart is told."""
    arms = {"rotations": ["none"], "mu_h": False}
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "journal.json.partial").write_text("{")
    assert run(uneven, words, text, begun, **arms)["rows"][0]["status"] == "measured"
    for damage, says in ((lambda path: path.unlink(), "what is left of a comparison; start over with --restart"),
                         (lambda path: path.write_text("{"), "is damaged .* start over with --restart")):
        out = copied(made[0])
        damage(out / JOURNAL)
        with pytest.raises(InputError, match=says):
            run(uneven, words, text, out, **arms)
        assert len(run(uneven, words, text, out, restart=True, **arms)["rows"]) == 1
    (tmp_path / "odd" / JOURNAL).mkdir(parents=True)
    with pytest.raises(InputError, match="journal.json cannot be read: Is a directory"):
        run(uneven, words, text, tmp_path / "odd", **arms)
    (out / "diary.txt").write_text("keep")
    (out / JOURNAL).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        run(uneven, words, text, out, restart=True, **arms)
    assert (out / "diary.txt").read_text() == "keep"


def test_an_arm_that_fails_is_a_row_with_its_reason(uneven, words, text, tmp_path):
    """R4's block does not divide the MLP, so nothing can run online; the unrotated model can be measured."""
    found = run(uneven, words, text, tmp_path / "out", online="yes", fields={"r4_block": 64})
    none, hadamard = found["rows"]
    assert none["status"] == "measured"
    assert hadamard["status"] == "failed" and "R4 block 64 must be" in hadamard["reason"]
    assert "failed" in (tmp_path / "out" / "results.md").read_text()


def test_a_model_is_quantised_once_for_rows_that_fail(uneven, words, text, tmp_path, monkeypatch):
    """In a run, and in the next one."""
    asked, tries = {"rotations": ["hadamard"], "activations": [16, 8]}, []
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize", lambda *_, **__: tries.append(1) or [][0])
        found = run(uneven, words, text, tmp_path / "out", **asked)
    assert tries == [1] and [row["reason"] for row in found["rows"]] == ["IndexError: list index out of range"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_score", lambda *_: [][0])
        found = run(uneven, words, text, tmp_path / "out", **asked)
    assert [row["status"] for row in found["rows"]] == ["failed"] * 2
    calls = []
    found = run(uneven, words, text, tmp_path / "out", progress=lambda *call: calls.append(call), **asked)
    assert [row["status"] for row in found["rows"]] == ["measured"] * 2
    assert "quantise layers" not in {call[0] for call in calls} and not (tmp_path / "out" / "work").exists()
    assert found == run(uneven, words, text, tmp_path / "plain", **asked)


def test_a_signal_that_came_out_as_another_exception_is_no_failed_row(uneven, words, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(uneven, words, text, tmp_path / "out", rotations=["hadamard"], online="yes", fields={"r4_block": 64},
            interrupted=lambda: True)
    assert not any(name.startswith("row ") for name in Journal.load(tmp_path / "out").entries)


def test_what_does_not_fit_the_time_is_left_out_and_measured_later(uneven, words, text, tmp_path):
    found = run(uneven, words, text, tmp_path / "out", max_minutes=0.02)
    assert {row["status"] for row in found["rows"]} == {"skipped"}
    assert all("of the 0.02 of --max-minutes are left" in row["reason"] for row in found["rows"])
    found = run(uneven, words, text, tmp_path / "out", max_minutes=60)
    assert {row["status"] for row in found["rows"]} == {"measured"}


def test_time_is_counted_for_what_is_left(uneven, words, text, tmp_path, monkeypatch):
    """A rotation is learned once, and rounding to nearest is no GPTQ."""
    seen = []

    def plan(source, recipe, start):
        seen.append((recipe.rotation, recipe.quantizer))
        return {"seconds": 0}

    monkeypatch.setattr("optrot_edge.plan.make_plan", plan)
    run(uneven, words, text, tmp_path / "out", rotations=["none", "optrot", "quip#"], quantizers=["gptq", "rtn"],
        max_minutes=60, mu_h=False)
    assert seen == [("none", "gptq"), ("optrot", "gptq"), ("none", "gptq"), ("none", "rtn"), ("hadamard", "rtn"),
                    ("none", "rtn")]


def test_a_damaged_rotation_is_made_again(uneven, words, text, tmp_path):
    first = run(uneven, words, text, tmp_path / "out", rotations=["hadamard"])
    path = tmp_path / "out" / "rotations" / "hadamard.safetensors"
    held = path.read_bytes()
    path.write_bytes(held[:-8] + bytes(8))
    found = run(uneven, words, text, tmp_path / "out", rotations=["hadamard"], bits=[4, 3])
    assert path.read_bytes() == held and first["rows"][0] == found["rows"][0]
    kl = [np.mean(row["window_kl"]) for row in found["rows"]]
    assert kl[1] > kl[0]


def test_baselines_and_what_runs_online(uneven, words, text, tmp_path):
    """Too short a learning says so in the row; one checkpoint serves all activations."""
    calls = []
    arms = ["hadamard", "spinquant", "spinquant-w4", "spinquant-a4", "kurtail", "ostquant", "quip#", "flatquant",
            "butterflyquant"]
    found = run(uneven, words, text, tmp_path / "out", rotations=arms, activations=[16, 4], mu_h=False, online="both",
                fields={"e2e_steps": 2}, progress=lambda *call: calls.append(call))
    assert {row["status"] for row in found["rows"]} == {"measured"}, [row.get("reason") for row in found["rows"]]
    rows = {row["name"]: row for row in found["rows"]}
    fused = [f"{arm}-w4-gptq{online}" for arm in arms[:6] for online in ("", "-online")]
    assert list(dict.fromkeys(row["build"] for row in found["rows"])) == [
        *fused[::2], *(f"{arm}-w4-gptq" for arm in arms[6:]), *fused[1::2]]
    assert sum(call[:2] == ("quantise layers", 1) for call in calls) == len(fused) + 1 + 2 * 2
    assert sum(call[:2] == ("learn transforms", 1) for call in calls) == 2 * 2
    for build in fused:
        assert rows[f"{build}-a4"]["kl_mean"] > rows[f"{build}-a16"]["kl_mean"]
    for row in found["rows"]:
        if row["arm"] in ("hadamard", "quip#"):
            assert row["learning"] is row["not_reproduced"] is None
        else:
            assert row["learning"]["steps"] == 2 and "2 steps, fewer than 100" in row["not_reproduced"]
            assert row["learning"]["loss_start"] > 0
    shown = [[row["arm"] for row in table["rows"]] for table in tables(found)]
    assert len(shown) == 4 and all(names == arms for names in shown)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "FlatQuant: not reproduced: 2 steps" in page and "W4A4, GPTQ" in page
