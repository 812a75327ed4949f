"""The column of zero-shot accuracies: what it holds, what is left out, going on where a run without it ended."""

from __future__ import annotations

import csv
import json

import pytest

from optrot_edge.compare.comparison import compare
from optrot_edge.compare.tables import mean_accuracy, tables
from optrot_edge.runtime import zero_shot
from optrot_edge.runtime.text import open_tokenizer
from optrot_edge.runtime.torch_reference import TorchBackend
from tests.cli_runner import refused, run_ok
from tests.compare.conftest import options
from tests.compare.test_cli import arguments
from tests.zero_shot_task import save_task

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
FEW = {"rotations": ["none"], "quantizers": ["rtn"], "mu_h": False}


def test_a_column_of_accuracies(uneven, words, text, tmp_path, capfd):
    """Of every row and of the float model, in tables, CSV and page; nothing is measured twice."""
    given = arguments(uneven, words, text, tmp_path / "out", "--quantizers", "rtn", "--activations", "16,4")
    run_ok(*given, "-q")
    before = json.loads((tmp_path / "out" / "results.json").read_text())
    one, two = save_task(tmp_path, "One"), save_task(tmp_path, "two", "acc")
    capfd.readouterr()
    run_ok(*given, "--tasks", f"{one}, {two}", "--task-limit", "4")
    printed = capfd.readouterr()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "Building contexts" not in printed.err and "zero-shot" in printed.out
    tasks, _ = zero_shot.load_tasks([one, two], 4)
    with TorchBackend(uneven) as runner:
        original = zero_shot.score_tasks(runner, open_tokenizer(uneven), tasks)
    assert found["zero_shot"] == {"tasks": ["One", "two"], "limit": 4, "left_out": {}, "original": original}
    assert len(found["rows"]) == 4
    for row, former in zip(found["rows"], before["rows"], strict=True):
        assert row == former | {"zero_shot": row["zero_shot"]}
        assert {name: score["metric"] for name, score in row["zero_shot"].items()} == {"One": "acc_norm", "two": "acc"}
    for table in tables(found):
        assert all(len(cells) == 8 and cells[-1].endswith(" %") for cells in table["cells"])
    row = found["rows"][-1]
    with (tmp_path / "out" / "results.csv").open() as lines:
        last = list(csv.DictReader(lines))[-1]
    assert (float(last["zero_shot_mean"]), float(last["zero_shot_se"])) == pytest.approx(
        mean_accuracy(row["zero_shot"]))
    page, said = (tmp_path / "out" / "index.html").read_text(), "Zero-shot: mean accuracy in One (acc_norm, 4 items)"
    assert said in page and said in printed.out.replace("\n", " ") and "The float model has" in page
    run_ok(*given, "-q")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == before


def test_tasks_may_be_added_and_rows_too(uneven, words, text, tmp_path, monkeypatch):
    one, two = save_task(tmp_path, "one"), save_task(tmp_path, "two")
    asked, genuine = [], zero_shot.score_tasks

    def counted(runner, tokenizer, tasks, **more):
        asked.append(sorted(tasks))
        return genuine(runner, tokenizer, tasks, **more)

    monkeypatch.setattr(zero_shot, "score_tasks", counted)

    def measured(tasks, limit=2, rotations=("none",)):
        asked.clear()
        compare(uneven, tmp_path / "out", text=words, **options(
            text, **FEW | {"rotations": list(rotations)}, tasks=tasks, task_limit=limit))
        return asked

    assert measured([one]) == [["one"], ["one"]]  # the row, the float model
    assert measured([one]) == []
    assert measured([one, two]) == [["two"], ["two"]]
    assert measured([one], rotations=("none", "hadamard")) == [["one"]]
    assert measured([one], limit=3) == [["one"], ["one"]]
    (tmp_path / "one.jsonl").write_text("".join(reversed((tmp_path / "one.jsonl").open().readlines())))
    assert measured([one], limit=3) == [["one"], ["one"]]  # other items
    assert measured([one, two], limit=3) == [["two"], ["two"]]


def test_what_is_left_out_is_said(uneven, words, text, tmp_path, capfd):
    one, gone = save_task(tmp_path, "one"), save_task(tmp_path, "gone")
    (tmp_path / "gone.jsonl").unlink()
    given = arguments(uneven, words, text, tmp_path / "out", "--quantizers", "rtn", "--rotations", "none")
    run_ok(*given, "--tasks", gone)
    said = "Zero-shot tasks left out, for they cannot be loaded: "
    assert said in " ".join(capfd.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["zero_shot"]["tasks"] == [] and list(found["zero_shot"]["left_out"]) == [gone]
    assert all(len(cells) == 7 for table in tables(found) for cells in table["cells"])
    assert said in (tmp_path / "out" / "results.md").read_text()
    run_ok(*given, "--tasks", f"{gone},{one}", "-q")
    assert "zero-shot |" in (tmp_path / "out" / "results.md").read_text()
    for more, says in ((("--tasks", "helaswag"), "no task of lm-eval"), (("--task-limit", "0"), "--task-limit 0"),
                       (("--task-limit", "5"), "--task-limit is the number of items of each of --tasks")):
        refused(capfd, *given, *more, says=says)


def test_a_task_that_fails_leaves_the_row(uneven, words, text, tmp_path, monkeypatch):
    """What was measured stands, and the next run tries again."""
    one, two = save_task(tmp_path, "one"), save_task(tmp_path, "two")
    shared = {**FEW, "task_limit": 2}
    measured = lambda *tasks: compare(uneven, tmp_path / "out", text=words, **options(  # noqa: E731
        text, **shared, tasks=list(tasks)))
    before, = measured(one)["rows"]
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "continuation_scores", lambda *_: 1 / 0)
        failed, = measured(one, two)["rows"]
    assert failed == before | {"zero_shot_reason": "ZeroDivisionError: division by zero"}
    found = measured(one, two)
    row, = found["rows"]
    assert set(row["zero_shot"]) == {"one", "two"} == set(found["zero_shot"]["original"])
    assert row == before | {"zero_shot": row["zero_shot"]}
