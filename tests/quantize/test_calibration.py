"""Calibration text: the built-in one's disjoint splits, seeded windows, refusals."""

import numpy as np
import pytest

from optrot_edge.errors import InputError
from optrot_edge.quantize import calibration
from optrot_edge.quantize.calibration import builtin_text, load_text, sample_windows


def test_builtin_splits_share_no_paragraph():
    train, test = ({" ".join(part.split()) for part in builtin_text(split).split("\n\n")}
                   for split in ("train", "test"))
    assert len(test) > 100 and not test & train
    assert load_text("builtin", split="test") == builtin_text("test")
    assert len(builtin_text()) > 300_000


@pytest.mark.parametrize("bos", [None, 7])
def test_windows_are_disjoint_seeded_runs_of_the_text(bos):
    ids = np.arange(1000, 2000)
    windows = sample_windows(ids, 12, 32, seed=3, bos=bos)
    body = windows if bos is None else windows[:, 1:]
    assert windows.shape == (12, 32) and (bos is None or (windows[:, 0] == bos).all())
    assert (np.diff(body, axis=1) == 1).all() and len(np.unique(body)) == body.size
    assert np.array_equal(windows, sample_windows(ids, 12, 32, seed=3, bos=bos))
    assert not np.array_equal(windows, sample_windows(ids, 12, 32, seed=4, bos=bos))


def test_short_empty_and_missing_texts_are_refused(tmp_path):
    with pytest.raises(InputError, match="enough for 3 windows of 32; 4 were asked for"):
        sample_windows(range(100), 4, 32, seed=0)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match="empty"):
        load_text(str(tmp_path / "empty.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        load_text(str(tmp_path / "latin.txt"))
    with pytest.raises(InputError, match="not found"):
        load_text(str(tmp_path / "none.txt"))


@pytest.mark.parametrize("name", ["wikimedia/wikipedia:20231101.en", "allenai/c4:en.noblocklist", "a/b"])
def test_hub_datasets_are_told_from_files(name, monkeypatch):
    """A dot in the name of a configuration is no file's suffix."""
    monkeypatch.setattr(calibration, "_hub_text", lambda source, split: f"{source}, {split}")
    assert load_text(name, "test") == f"{name}, test"
