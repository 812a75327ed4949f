"""What every exporter of folders keeps to: what is replaced, and what stays of a failure."""

from __future__ import annotations

import shutil

import pytest

from optrot_edge.checkpoint import QuantizedCheckpoint
from optrot_edge.errors import InputError
from tests.cli_runner import left, refused, run_ok


def only_packages_are_replaced(checkpoint, tmp_path, capfd, format: str) -> None:
    """By `export` of the checkpoint, alone in `tmp_path`: with --overwrite, and nothing but packages of the format."""
    export = ["export", checkpoint, "--format", format, "--out"]
    run_ok(*export, tmp_path / "package", "-q")
    refused(capfd, *export, tmp_path / "package", says="package exists")
    (tmp_path / "package/stray").write_text("")
    run_ok(*export, tmp_path / "package", "--overwrite", "-q")
    assert not (tmp_path / "package/stray").exists()
    (tmp_path / "other").mkdir()
    for config in ("{}", '{"optrot": {"format": "another"}}', "not JSON"):
        (tmp_path / "other/config.json").write_text(config)
        refused(capfd, *export, tmp_path / "other", "--overwrite", says=f"is no {format.upper()} package")
    assert left(tmp_path) == ["c", "other", "package"] and left(tmp_path / "other") == ["config.json"]


def nothing_is_left_of_a_failure(checkpoint, tmp_path, export) -> None:
    """Of an interrupt half-way through `export`, and of bad input."""
    def interrupt(done, total, what):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(QuantizedCheckpoint(checkpoint), tmp_path / "package", progress=interrupt)
    shutil.rmtree(checkpoint / "tokenizer")
    with pytest.raises(InputError):
        export(QuantizedCheckpoint(checkpoint), tmp_path / "package")
    assert left(tmp_path) == ["c"]
