"""The report beside a rotation: its numbers against definitions, its files, its figure."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from optrot_edge.errors import InputError
from optrot_edge.models import open_model
from optrot_edge.quantize.sequential import LINEARS
from optrot_edge.rotations.covariance import collect
from optrot_edge.rotations.fuse import RotatedModel
from optrot_edge.rotations.report import (
    input_quantities,
    measure,
    read_summary,
    report_paths,
    spectrum,
    summarise,
    write_report,
)
from tests.cli_runner import left
from tests.rotations.test_covariance import TOKENS, covariances_of_inputs
from tests.rotations.test_fuse import rotation_for

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
KIND = {"q_proj": "attn", "k_proj": "attn", "v_proj": "attn", "o_proj": "o", "gate_proj": "mlp", "up_proj": "mlp",
        "down_proj": "down"}


@pytest.fixture(scope="module")
def measured(tiny):
    """(source, rotation, rows) of a tiny model with all rotations."""
    source = open_model(tiny("llama"))
    rotation = rotation_for(source.config, r3_block=16, r4_block=32)
    with collect(source, TOKENS) as covariances:
        rows = measure(source, rotation, covariances)
    return source, rotation, rows


def tr_d(h: torch.Tensor, damp: float) -> float:
    """Σ D_j by its meaning: what is left of x_j when the columns visited after it are chosen best."""
    order = h.diagonal().argsort(descending=True)
    h = h[order][:, order] + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    total = float(h[-1, -1])
    for j in range(len(h) - 1):
        total += float(h[j, j] - h[j, j + 1:] @ torch.linalg.solve(h[j + 1:, j + 1:], h[j + 1:, j]))
    return total


def test_every_number_is_what_it_is_defined_as(measured):
    source, rotation, rows = measured
    assert [(row["layer"], row["matrix"]) for row in rows] == [
        (i, name) for i in range(2) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                 "down_proj")]
    costs = {}
    for when, model in (("before", source), ("after", RotatedModel(source, rotation))):
        inputs, weights = covariances_of_inputs(model, 1), model.layer(1, torch.float64)
        for row in rows[7:]:
            found, h, w = row[when], inputs[KIND[row["matrix"]]], weights[f"{row['matrix']}.weight"]
            mu_w = float(w.abs().max()) * math.sqrt(w.numel()) / float(w.norm())
            assert found["mu_w"] == pytest.approx(mu_w, rel=1e-5)
            assert found["frobenius"] == pytest.approx(float(w.norm()), rel=1e-5)
            assert found["kurtosis"] == pytest.approx(float((w**4).mean() / (w**2).mean() ** 2), rel=1e-5)
            assert found["tr_h"] == pytest.approx(float(h.trace()), rel=1e-5)
            assert found["tr_d"] == pytest.approx(tr_d(h, 0.1), rel=1e-4)
            assert found["tr_d_over_tr_h"] == pytest.approx(found["tr_d"] / found["tr_h"])
            assert found["mu_w_mu_h"] == pytest.approx(found["mu_w"] * found["mu_h"])
            assert 1 <= found["mu_h"] <= math.sqrt(len(h))
            costs[when, row["matrix"]] = float(w.norm()) ** 2 * tr_d(h, 0.1)
    for row in rows[7:]:
        expected = costs["after", row["matrix"]] / costs["before", row["matrix"]]
        assert row["tr_d_ratio"] == pytest.approx(expected, rel=2e-4)


def test_a_rotation_that_does_nothing_changes_nothing(tiny):
    """R2 alone: q, k, gate, up and down keep weights and inputs; v and o keep only tr H and the norm."""
    source = open_model(tiny("llama"))
    with collect(source, TOKENS) as covariances:
        rows = measure(source, rotation_for(source.config, "r2"), covariances)
    for row in rows:
        before, after = row["before"], row["after"]
        if row["matrix"] in ("v_proj", "o_proj"):
            assert after["mu_w"] != pytest.approx(before["mu_w"], rel=1e-3)
            assert after["frobenius"] == pytest.approx(before["frobenius"], rel=1e-5)
            assert after["tr_h"] == pytest.approx(before["tr_h"], rel=1e-5)
        else:
            assert after == before and row["tr_d_ratio"] == 1
    o = next(row for row in rows if row["matrix"] == "o_proj")
    assert o["after"]["mu_h"] != o["before"]["mu_h"] and o["after"]["tr_d"] != o["before"]["tr_d"]


def test_incoherence_of_known_eigenvectors():
    eigenvalues = torch.arange(1, 17, dtype=torch.float64)
    assert spectrum(eigenvalues.diag()) == pytest.approx((4, 16))
    flat = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        flat = torch.cat([torch.cat([flat, flat], 1), torch.cat([flat, -flat], 1)]) / math.sqrt(2)
    assert spectrum(flat @ eigenvalues.diag() @ flat.T) == pytest.approx((1, 16))


def test_null_directions_of_few_tokens_do_not_count():
    """Three flat directions were seen; the other thirteen eigenvectors are the solver's own choice."""
    x = torch.ones(3, 16, dtype=torch.float64)
    x[1, ::2], x[2, 8:] = -2, -3
    h = x.T @ x / 3
    seen = torch.linalg.svd(x).Vh[:3]
    assert spectrum(h, tokens=3)[0] == pytest.approx(float(seen.abs().max()) * 4, rel=1e-6)
    assert spectrum(h)[0] > 1.5 * spectrum(h, tokens=3)[0]


def test_mu_h_may_be_left_out():
    h = torch.eye(8, dtype=torch.float64)
    full, short = (input_quantities(h, damp=0.1, act_order=True, mu_h=mu_h) for mu_h in (True, False))
    assert short == {**full, "mu_h": None, "lambda_max": None} and full["tr_d"] == pytest.approx(8.8)


def test_without_text_only_the_weights_are_measured(measured):
    source, rotation, rows = measured
    bare = measure(source, rotation, None)
    assert [row["after"]["mu_w"] for row in bare] == [row["after"]["mu_w"] for row in rows]
    assert {row[when][name] for row in bare for when in ("before", "after")
            for name in ("mu_h", "mu_w_mu_h", "tr_d", "tr_d_over_tr_h")} == {None}
    assert {row["tr_d_ratio"] for row in bare} == {None} and summarise(bare)[0]["mu_h_after"] is None


def test_summary_is_the_median_over_layers(measured):
    _, _, rows = measured
    o = next(entry for entry in summarise(rows) if entry["matrix"] == "o_proj")
    values = [row["before"]["mu_h"] for row in rows if row["matrix"] == "o_proj"]
    assert len(values) == 2 and o["mu_h_before"] == pytest.approx(sum(values) / 2)


def test_paths_beside_the_rotation(tmp_path):
    assert [path.name for path in report_paths(tmp_path / "a.b.safetensors")] == ["a.b.json", "a.b.png"]
    assert [path.name for path in report_paths(tmp_path / "a.q4")] == ["a.q4.json", "a.q4.png"]
    assert report_paths(tmp_path / "a.json")[0].name == "a.json.json"  # never the rotation file itself


def about(rows, **changes) -> dict:
    """The least that `write_report` needs."""
    calibration = {"source": "text.txt", "tokens": 192}
    return {"rotation": "hadamard", "applied": ["r1", "r2"], "recipe": {}, "model": "tiny", "calibration": calibration,
            "damp": 0.1, "act_order": True, "notes": [], "summary": summarise(rows), "layers": rows, **changes}


def size_of(png) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" in data[-12:]
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_a_panel_row_for_everything_there_is(measured, tmp_path):
    """Learning curves and the inputs' quantities each make the figure taller."""
    source, rotation, rows = measured
    bare = measure(source, rotation, None)
    learned = {"loss_curve": [9.0, 8.0, 7.0], "layer_loss_start": [5.0, 4.0], "layer_loss": [4.0, 3.0]}
    heights = []
    for report in (about(bare, calibration=None), about(rows), about(rows, recipe=learned)):
        assert write_report(tmp_path / "r.safetensors", report)["figure"] == "r.png"
        width, height = size_of(tmp_path / "r.png")
        assert width > 1500
        heights.append(height)
    assert heights == sorted(set(heights))
    assert json.loads((tmp_path / "r.json").read_text())["recipe"] == learned and left(tmp_path) == ["r.json", "r.png"]


def test_curves_carry_the_reports_numbers(measured):
    """What is drawn, read back from the figure's lines."""
    from matplotlib.figure import Figure

    from optrot_edge.rotations.figure import QUANTITIES, _draw_learning, _draw_matrices

    _, _, rows = measured
    grid = Figure()
    _draw_matrices(grid, rows, QUANTITIES, True)
    panels = iter(grid.axes)
    for key in ("mu_w", "mu_h", "mu_w_mu_h", "tr_d_over_tr_h", "tr_d_ratio"):
        for name in LINEARS:
            of = [row for row in rows if row["matrix"] == name]
            drawn = [list(line.get_ydata()) for line in next(panels).get_lines()]
            expected = ([[1, 1], [row[key] for row in of]] if key == "tr_d_ratio"
                        else [[row[when][key] for row in of] for when in ("before", "after")])
            assert drawn == expected, (key, name)
    recipe = {"loss_curve": [9.0, 8.0, 7.0], "layer_loss_start": [5.0, 4.0], "layer_loss": [4.0, 3.0]}
    curves = Figure()
    _draw_learning(curves, recipe)
    drawn = [[list(line.get_ydata()) for line in axes.get_lines()] for axes in curves.axes]
    assert drawn == [[[9.0, 8.0, 7.0]], [[5.0, 4.0], [4.0, 3.0]]]


def test_without_matplotlib_the_report_says_so(measured, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    written = write_report(tmp_path / "r.safetensors", about(measured[2]))
    assert written["figure"] is None and left(tmp_path) == ["r.json"]
    assert "no figure was drawn" in written["notes"][0] and 'pip install "optrot-edge[learn]"' in written["notes"][0]
    summary = read_summary(tmp_path / "r.safetensors")
    assert summary["figure"] is None and summary["notes"] == written["notes"]


def test_nothing_half_written(measured, tmp_path, monkeypatch):
    def torn(report, path):
        path.write_bytes(b"\x89PNG half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("optrot_edge.rotations.figure.draw", torn)
    with pytest.raises(InputError, match="cannot write .*r.png: No space left on device"):
        write_report(tmp_path / "r.safetensors", about(measured[2]))
    assert left(tmp_path) == []
