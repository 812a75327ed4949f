"""The scaling script: its counts, its fit and its plan."""

from __future__ import annotations

import json

import pytest
import scaling


def test_operations_grow_as_their_formulas_say():
    """Twice the width: eight times the solving; moments and the matrices' part of the forward four times."""
    small, large = (scaling.operations(scaling.shaped(h, 7 * h // 2, 2, 8, 1, 256), 1024, 0) for h in (256, 512))
    for name, power in (("forward", 2), ("moments", 2), ("factors", 3), ("columns", 3), ("corrections", 3)):
        assert large[name] == 2**power * small[name]
    twice = scaling.operations(scaling.shaped(256, 896, 2, 8, 1, 256), 2048, 0)
    assert (twice["forward"], twice["columns"]) == (2 * small["forward"], small["columns"])


def test_rates_are_found_again():
    rows = [{"streaming Gflop": a, "solving Gflop": b, "seconds": a / 40 + b / 10}
            for a, b in ((1, 2), (3, 9), (8, 40))]
    rates = scaling.fitted_rates(rows)
    assert rates["streaming Gflop/s"] == pytest.approx(40) and rates["solving Gflop/s"] == pytest.approx(10)
    assert rates["worst relative error"] < 1e-9


def test_it_measures_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "SIZES", (64, 128))
    scaling.main(["--out", str(tmp_path / "scaling.json")])
    results = json.loads((tmp_path / "scaling.json").read_text())
    assert [row["hidden"] for row in results["rows"]] == [64, 128]
    assert all(row["seconds"] > 0 for row in results["rows"])
    plan = results["70B"]
    assert plan["weights per layer"] == 8192 * (2 * 8192 + 2 * 1024 + 3 * 28672)
    assert plan["hours, 80 layers"]["1 GPU"] > plan["hours, 80 layers"]["8 GPUs"] > 0
