"""Runs the command line, in this process or in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from optrot_edge.cli import main
from tests.road import FAST_OPTIONS, save_model, write_text

RTN = ["--quantizer", "rtn", "--calibration", "none", "--rotation", "none"]


def run(*arguments) -> int:
    """Exit code of the command in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def run_ok(*arguments) -> None:
    assert run(*arguments) == 0


def child(*arguments, **options) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "optrot_edge", *map(str, arguments)], capture_output=True, text=True,
                          timeout=300, check=False, **options)


def refused(capfd, *arguments, says: str, code: int = 2) -> str:
    """The command ends with `code`, and with one line on standard error that holds `says`."""
    assert run(*arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ") and says in line, err
    return line


def left(folder: Path) -> list[str]:
    """Names of all that lies in `folder`, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def make_files(root: Path) -> dict[str, Path]:
    """One of everything that commands take: model, text, rotation, checkpoint and gguf."""
    paths = {"model": save_model(root / "model", "smollm2"), "text": write_text(root / "text.txt"),
             "checkpoint": root / "checkpoint", "gguf": root / "m.gguf", "rotation": root / "r.safetensors"}
    run_ok("rotate", paths["model"], "--out", paths["rotation"], "-q", *FAST_OPTIONS[:4])
    run_ok("quantize", paths["model"], "--out", paths["checkpoint"], "--calibration", paths["text"],
           "--rotation", paths["rotation"], "-q", *FAST_OPTIONS)
    run_ok("export", paths["checkpoint"], "--out", paths["gguf"], "-q")
    return paths
