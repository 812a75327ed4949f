"""Figures, page and tables: they hold what was measured, all of it, and nothing from outside."""

from __future__ import annotations

import base64
import csv
import itertools
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from optrot_edge.compare.arms import ARMS, Arm, learning_of, not_reproduced
from optrot_edge.compare.figures import figures
from optrot_edge.compare.report import write_reports
from optrot_edge.compare.tables import about, cells, markdown, tables
from optrot_edge.runtime.metrics import paired_bootstrap
from tests.compare.conftest import ALL
from tests.rotations.test_report import size_of

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
LABELS = [ARMS[name].label for name in ALL]


def built(found: dict, name: str):
    return next(figure for figure in figures(found) if figure.name == name).build()


def test_every_figure_is_a_picture(made):
    out, found = made
    names = {figure.name for figure in figures(found)}
    kinds = ["mu-w", "mu-h", "mu-w-mu-h", "tr-d-over-tr-h", *(f"{kind}-w{bits}-{quantizer}" for bits in (4, 3) for
             kind, quantizer in (("snr", "gptq"), ("snr", "rtn"), ("bound", "rtn")))]
    assert names == {"kl.png", "learning.png", *(f"{kind}.png" for kind in kinds)}
    assert {path.name for path in (out / "figures").iterdir()} == names
    for path in (out / "figures").iterdir():
        width, height = size_of(path)
        assert width > 600 and height > 400


@pytest.mark.parametrize("renamed", [False, True])
def test_titles_of_panels_are_whole(renamed, made):
    """Where tables have arms of different names too, whose names then stand beside every panel."""
    _, found = made
    rows = [row | {"label": "QuIP# (random Hadamards)"} if renamed and row["bits"] == 3 else row
            for row in found["rows"]]
    figure = built(found | {"rows": rows}, "kl.png")
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        extent = axes.title.get_window_extent()
        assert not axes.get_title() or (extent.x0 >= 0 and extent.x1 <= figure.bbox.x1)
    for left, right in itertools.pairwise([axes for axes in figure.axes if axes.get_title()][:3]):
        assert left.title.get_window_extent().x1 < right.title.get_window_extent().x0


def test_bars_show_every_arm_and_its_number(made):
    _, found = made
    figure = built(found, "kl.png")
    panels = [axes for axes in figure.axes if axes.get_title()]
    shown = tables(found)
    assert len(panels) == len(shown) == 4 * len(found["lists"]["activations"])
    for axes, table in zip(panels, shown, strict=True):
        if axes.get_subplotspec().is_first_col():
            assert [label.get_text() for label in axes.get_yticklabels()] == LABELS
        widths = [bar.get_width() for bars in axes.containers if hasattr(bars, "patches") for bar in bars]
        assert widths == [row["kl_mean"] for row in table["rows"]]
        assert axes.get_xlim()[1] > max(widths) and axes.get_xlabel() == "KL (nats)"


@pytest.mark.parametrize(("name", "key", "labels"), [
    ("mu-w.png", "mu_w", LABELS[:4] + ["OptRot+, 4 bits", "OptRot+, 3 bits"]),
    ("mu-w-mu-h.png", "mu_w_mu_h", LABELS[:4] + ["OptRot+, 4 bits", "OptRot+, 3 bits"]),
    ("snr-w4-gptq.png", "snr_db", LABELS), ("bound-w3-rtn.png", "snr_db", LABELS)])
def test_curves_show_every_arm_and_its_numbers(name, key, labels, made):
    _, found = made
    figure = built(found, name)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                     "down_proj"]
    legend = next(axes.get_legend() for axes in figure.axes if axes.get_legend())
    assert [entry.get_text() for entry in legend.get_texts()] == labels
    if key == "snr_db":
        layers = [found["errors"][f"{arm}-{name.partition('-')[2].removesuffix('.png')}"] for arm in ALL]
    else:
        layers = [found["quantities"][rotation]["layers"] for rotation in (*ALL[:4], "optrot+-w4", "optrot+-w3")]
    keys = [key, "bound_db"] if name.startswith("bound") else [key]
    expected = [[row[one] for row in rows if row["matrix"] == "down_proj"] for rows in layers for one in keys]
    assert [list(line.get_ydata()) for line in panels[-1].get_lines()] == expected


def test_learning_curves(made):
    _, found = made
    panels = [axes for axes in built(found, "learning.png").axes if axes.get_title()]
    assert [list(axes.get_lines()[0].get_ydata()) for axes in panels] == list(found["curves"].values())
    assert {axes.get_title().split(",")[0] for axes in panels} == {"OptRot", "OptRot+"} and len(panels) == 4


def test_the_page_is_well_formed_and_brings_everything(made):
    out, found = made
    text = (out / "index.html").read_text()
    root = ElementTree.fromstring(text)  # every tag is closed, every attribute quoted
    assert root.tag == "html" and root.get("lang") == "en" and text.startswith("<!DOCTYPE html>")
    tags = [element.tag for element in root.iter()]
    assert not {"script", "link", "iframe", "object"} & set(tags) and "prefers-color-scheme: dark" in text
    assert not re.search(r"https?:|url\(|@import", text)
    images = list(root.iter("img"))
    assert [image.get("alt") for image in images] == [figure.caption for figure in figures(found)]
    for image, figure in zip(images, figures(found), strict=True):
        kind, data = image.get("src").split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True) == (out / "figures" / figure.name).read_bytes()
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert {link.get("href").removeprefix("#") for link in root.iter("a")} <= set(ids)
    measured = [table for table in root.iter("table") if table.get("class") == "measured"]
    for table, wanted in zip(measured, tables(found), strict=True):
        assert table.get("aria-labelledby") in ids
        assert all(head.get("scope") in ("col", "row") for head in table.iter("th"))
        rows = [["".join(cell.itertext()) for cell in line] for line in table.find("tbody")]
        assert rows == wanted["cells"] and [row[0] for row in rows] == LABELS
        best = [line[0].text for line in table.find("tbody") if line.get("class") == "best"]
        least = min(row["kl_mean"] for row in wanted["rows"])
        assert best == [row["label"] for row in wanted["rows"] if row["kl_mean"] == least]


def test_names_cannot_break_the_page(made, tmp_path):
    _, found = made
    write_reports(tmp_path, {**found, "model": "<b>&amp;\"'", "quantities": {}, "curves": {}, "errors": {}})
    root = ElementTree.fromstring((tmp_path / "index.html").read_text())
    assert root.find("body/main/h1").text == "<b>&amp;\"': rotations compared"
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["kl.png"]


def test_markdown_and_csv_hold_every_row(made):
    out, found = made
    text = (out / "results.md").read_text()
    assert text == markdown(found)
    for table in tables(found):
        assert f"## {table['title']}" in text
        for row in table["cells"]:
            assert "| " + " | ".join(row) + " |" in text
    with open(out / "results.csv") as handle:
        lines = list(csv.DictReader(handle))
    assert [float(line["kl_mean"]) for line in lines] == [row["kl_mean"] for row in found["rows"]]
    assert [line["arm"] for line in lines] == [row["arm"] for row in found["rows"]]


def test_ratios_are_paired(made):
    rows = tables(made[1])[0]["rows"]
    none, base = rows[0], rows[1]
    wanted = paired_bootstrap(np.array(none["window_kl"]), np.array(base["window_kl"]))
    assert cells(none, base)[2] == f"{wanted.ratio:.3f} ({wanted.low:.3f}-{wanted.high:.3f})"
    assert cells(base, base)[2] == "1" and cells(none, None)[2] == ""


def test_a_small_divergence_keeps_its_digits(made):
    row = made[1]["rows"][0]
    assert cells(row | {"kl_mean": 0.00012345, "kl_se": 0.0000021}, None)[1] == "0.000123 ± 0.000002"
    assert cells(row | {"kl_mean": 0.12345, "kl_se": 0.0021}, None)[1] == "0.1235 ± 0.0021"


def test_what_runs_online_is_said(made):
    _, found = made
    assert not any("which run online" in line for line in about(found))
    lists = found["lists"] | {"rotations": ["none", "quip#", "flatquant"]}
    assert "MB of QuIP# (random Hadamards), FlatQuant: without their transforms" in about(found | {"lists": lists})[-1]


BASELINE = Arm("theirs", "Theirs", "theirs", baseline=True)
GOOD = {"steps": 100, "tokens_per_step": 1024, "loss_start": 2.0, "loss": 1.9}


@pytest.mark.parametrize(("changes", "says"), [
    ({}, None), ({"steps": 99}, "99 steps, fewer than 100"), ({"tokens_per_step": 1023}, "1023 tokens a step"),
    ({"loss": 2.0}, "did not fall, so the start was kept"), ({"loss": float("nan")}, "did not fall")])
def test_when_a_baseline_was_not_reproduced(changes, says):
    found = not_reproduced(BASELINE, GOOD | changes)
    assert found is None if says is None else says in found
    assert not_reproduced(ARMS["optrot"], GOOD | changes) is None
    assert not_reproduced(BASELINE, None) == "no record of its learning"


def test_what_was_learned_is_read_from_the_recipe():
    assert learning_of({"seed": 0}) is None
    assert learning_of({"steps": 80, "steps_taken": 40, "loss_start": 3.0, "loss": 2.0}) == {
        "steps": 40, "tokens_per_step": None, "loss_start": 3.0, "loss": 2.0}
    assert learning_of({"steps": 100, "tokens": 2048, "loss_start": 3.0, "loss": 2.0})["tokens_per_step"] == 2048
