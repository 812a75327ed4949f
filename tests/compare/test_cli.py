"""`optrot-edge compare`: what it prints, its exit codes, and a signal in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from optrot_edge.journal import JOURNAL
from tests.cli_runner import child, left, refused, run, run_ok
from tests.compare.conftest import FIELDS, SHAPE

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
OPTIONS = [part for name, value in {**SHAPE, **FIELDS}.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def arguments(uneven, words, text, out, *more) -> list[str]:
    return ["compare", str(uneven), "--text", words, "--calibration", text, "--out", str(out), *OPTIONS, "--no-mu-h",
            "--rotations", "none,hadamard", *more]


def test_it_prints_tables_and_where_the_rest_is(uneven, words, text, tmp_path, capfd):
    given = arguments(uneven, words, text, tmp_path / "out", "--quantizers", "rtn", "--bits", "4, 3")
    run_ok(*given)
    out = capfd.readouterr().out
    for title in ("W4, RTN, groups of 32", "W3, RTN, groups of 32"):
        assert title in out
    assert "hadamard" in out and f"{tmp_path / 'out'}/index.html" in out
    run_ok(*given, "--json")
    found = json.loads(capfd.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["name"] for row in found["rows"]] == [f"{arm}-w{bits}-rtn-a16" for bits in (4, 3) for arm in
                                                      ("none", "hadamard")]
    assert all(layer["mu_h"] is None for layer in found["quantities"]["none"]["layers"])
    assert left(tmp_path / "out" / "figures") == ["kl.png", "mu-w.png", "snr-w3-rtn.png", "snr-w4-rtn.png",
                                                  "tr-d-over-tr-h.png"]
    refused(capfd, *given, "--seed", "1", says="--seed was 0, now it is 1")


@pytest.mark.parametrize(("more", "says"), [
    (("--bits", "four"), "whole numbers"), (("--rotations", "quarot"), "use none, hadamard"),
    (("--online", "R4"), "use no, yes, both"), (("--activations", ""), "--activations"),
    (("--text", "missing.txt"), "missing.txt not found")])
def test_refusals(more, says, uneven, words, text, tmp_path, capfd):
    refused(capfd, *arguments(uneven, words, text, tmp_path / "out", *more), says=says)
    assert left(tmp_path) == []


def test_no_row_at_all_is_bad_input(uneven, words, text, tmp_path, capfd):
    given = arguments(uneven, words, text, tmp_path / "out", "--rotations", "hadamard", "--online", "yes", "-q",
                      "--r4-block", "64")
    assert run(*given) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert "no row could be measured; hadamard-w4-gptq-online-a16: R4 block 64 must be a power of two" in said
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"][0]["status"] == "failed"


def test_help(capfd):
    assert run("compare", "--help") == 0
    said = capfd.readouterr().out
    assert "hadamard" in said and "--max-minutes" in said


@pytest.mark.slow
def test_sigterm_keeps_what_is_finished(uneven, words, text, tmp_path):
    given = arguments(uneven, words, text, tmp_path / "out", "--bits", "8,7,6,5,4,3,2")
    process = subprocess.Popen([sys.executable, "-m", "optrot_edge", *given], stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    journal, deadline = tmp_path / "out" / JOURNAL, time.monotonic() + 250
    while not (journal.exists() and '"row ' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert f"what is finished is kept in {tmp_path / 'out'}, and the same command continues" in " ".join(said.split())
    again = child(*given, "-q", env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert again.returncode == 0 and again.stdout == again.stderr == ""
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(rows) == 14 and {row["status"] for row in rows} == {"measured"}
