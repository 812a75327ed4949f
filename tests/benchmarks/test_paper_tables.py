"""The script of the paper's tables: what it keeps, and that the document says what the JSON holds."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import paper_tables
import pytest

from optrot_edge.compare.comparison import compare
from optrot_edge.compare.run import Comparison
from optrot_edge.compare.tables import tables
from optrot_edge.errors import InputError
from optrot_edge.journal import JOURNAL, Journal
from tests.compare.conftest import options
from tests.road import save_model

DOCUMENT = Path(__file__).parents[2] / "docs" / "paper.md"


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_the_document_holds_the_rows(text, tmp_path):
    found = compare(save_model(tmp_path / "model", "smollm2"), tmp_path / "out", text="builtin", **options(text))
    kept = json.loads(json.dumps(paper_tables.shortened(found)))
    assert kept["rows"] == found["rows"] and not {"errors", "curves", "quantities"} & set(kept)
    layers = found["quantities"]["hadamard"]["layers"]
    assert kept["medians"]["hadamard"]["mu_w"] == statistics.median(row["mu_w"] for row in layers)
    rows = [row["snr_db"] for row in found["errors"]["hadamard-w4-gptq"] if row["matrix"] == "up_proj"]
    assert len(rows) > 1 and kept["snr_db"]["hadamard-w4-gptq"]["up_proj"] == statistics.fmean(rows)
    document = tmp_path / "paper.md"
    document.write_text(f"before\n{paper_tables.BEGIN}\nold\n{paper_tables.END}\nafter\n")
    for _ in range(2):
        paper_tables.write_document({0: kept}, document)
        said = document.read_text()
        assert said == f"before\n{paper_tables.BEGIN}\n{paper_tables.written(kept)}\n{paper_tables.END}\nafter\n"
    for row in tables(found)[0]["cells"]:
        assert "| " + " | ".join(row) + " |" in said
    left = kept | {"lists": kept["lists"] | {"bits": [4, 3]}}  # as of a run that was stopped before 3 bits
    left["rows"] = kept["rows"] + [{**row, "bits": 3, "status": "pending", "reason": "later"} for row in kept["rows"]]
    assert paper_tables.written(left) == paper_tables.written(kept)


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_a_journal_goes_on_in_another_folder(text, tmp_path, monkeypatch):
    model, archive, other = save_model(tmp_path / "model", "smollm2"), tmp_path / "journal.json.gz", tmp_path / "other"
    found = compare(model, tmp_path / "out", text="builtin", **options(text))
    paper_tables.keep_journal(tmp_path / "out", archive)
    packed = archive.read_bytes()
    paper_tables.restore_journal(archive, other)
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_measure", lambda *_: pytest.fail("measured again"))
        assert compare(model, other, text="builtin", **options(text)) == found
    paper_tables.keep_journal(other, archive)
    assert archive.read_bytes() == packed

    journal = Journal.load(other)  # what only one of the two has measured is joined, both ways
    rows = [name for name in journal.entries if name.startswith("row ")]
    journal.entries = {name: entry for name, entry in journal.entries.items() if name != rows[0]}
    journal.note(rows[1], {"status": "skipped", "reason": "no time"})
    journal.note("row further", {"status": "measured"})
    paper_tables.keep_journal(other, archive)
    whole = paper_tables.load_archive(archive)["entries"]
    assert whole == Journal.load(tmp_path / "out").entries | {"row further": journal.entries["row further"]}
    assert paper_tables.restore_journal(archive, other) == whole == Journal.load(other).entries
    Journal(other, journal.settings | {"text": "another"}).save()
    with pytest.raises(InputError, match="other settings: the calibration text has changed. Choose another --work"):
        paper_tables.restore_journal(archive, other)


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_what_was_measured_before_ctrl_c_is_kept(text, tmp_path, monkeypatch):
    def stopped(model, folder, **_):
        compare(model, folder, text="builtin", **options(text))
        raise KeyboardInterrupt

    monkeypatch.setattr(paper_tables, "compare", stopped)
    monkeypatch.setattr(paper_tables, "build_testbed", lambda _: save_model(tmp_path / "model", "smollm2"))
    out, archive = tmp_path / "out.json", tmp_path / "journal.json.gz"
    monkeypatch.setattr("sys.argv", ["paper_tables.py", "--text", text, "--work", str(tmp_path / "work"), "--out",
                                     str(out), "--journal", str(archive)])
    with pytest.raises(KeyboardInterrupt):
        paper_tables.main()
    assert all(row["status"] == "measured" for row in json.loads(out.read_text())["rows"])
    paper_tables.restore_journal(archive, tmp_path / "other")
    assert (tmp_path / "other" / JOURNAL).read_bytes() == (tmp_path / "work" / "paper" / JOURNAL).read_bytes()


def script(monkeypatch, tmp_path, text, *arguments) -> tuple:
    """Run the script on a tiny model; the JSON it wrote, or None, and how it ended."""
    made = options(text)

    def tiny(model, folder, **given):
        own = {"text": "builtin", "group_size": 32, "windows": 3, "window": 32,
               "fields": made["fields"] | {"seed": given["fields"]["seed"]}}
        return compare(model, folder, **given | own)

    monkeypatch.setattr(paper_tables, "compare", tiny)
    monkeypatch.setattr(paper_tables, "build_testbed", lambda _: save_model(tmp_path / "model", "smollm2"))
    monkeypatch.setattr(paper_tables, "DOCUMENT", tmp_path / "paper.md")
    monkeypatch.setattr(paper_tables, "RESULTS_FOLDER", tmp_path)
    monkeypatch.setattr(paper_tables.write_document, "__defaults__", (tmp_path / "paper.md",))
    monkeypatch.setattr(paper_tables.load_seeds, "__defaults__", (tmp_path,))
    (tmp_path / "paper.md").write_text(f"{paper_tables.BEGIN}{paper_tables.END}")
    monkeypatch.setattr("sys.argv", ["paper_tables.py", "--text", text, "--work", str(tmp_path / "work"), *arguments])
    try:
        paper_tables.main()
        ended = 0
    except SystemExit as error:
        ended = error.code
    out = tmp_path / "paper_tables.json"
    return json.loads(out.read_text()) if out.exists() else None, ended


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_measuring_in_parts_loses_no_row(text, tmp_path, monkeypatch):
    parts = [("none,hadamard", "4"), ("hadamard", "3"), ("none", "4,3")]
    for rotations, bits in parts:
        found, ended = script(monkeypatch, tmp_path, text, "--rotations", rotations, "--bits", bits, "--quantizers",
                              "rtn", "--activations", "16", "--online", "no")
        assert ended == 0
    assert [(row["arm"], row["bits"], row["status"]) for row in found["rows"]] == [
        ("none", 4, "measured"), ("hadamard", 4, "measured"), ("none", 3, "measured"), ("hadamard", 3, "measured")]
    document = (tmp_path / "paper.md").read_text()
    assert document.count("| QuaRot (random Hadamard) |") == 2 and "pending" not in document
    names = ("paper_tables.json", "paper_tables.journal.json.gz")
    kept = [(tmp_path / name).read_bytes() for name in names]
    monkeypatch.setattr(Comparison, "measure", lambda *_: pytest.fail("measured"))
    _, ended = script(monkeypatch, tmp_path, text, "--rotations", "none", "--bits", "9")
    assert "--bits 9" in ended
    assert kept == [(tmp_path / name).read_bytes() for name in names]


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few")
def test_seeds_stand_side_by_side(text, tmp_path, monkeypatch):
    asked = ("--bits", "4", "--quantizers", "rtn", "--activations", "16", "--online", "no", "--rotations")
    for seed, rotations in (("0", "none,hadamard,optrot"), ("1", "hadamard,optrot"), ("2", "hadamard")):
        _, ended = script(monkeypatch, tmp_path, text, *asked, rotations, "--seed", seed)
        assert ended == 0
    kl = {}
    for seed in ("", "-seed1"):
        rows = json.loads((tmp_path / f"paper_tables{seed}.json").read_text())["rows"]
        kl[seed] = {row["arm"]: row["kl_mean"] for row in rows}
    assert kl[""]["hadamard"] != kl["-seed1"]["hadamard"]
    ratios = [of["optrot"] / of["hadamard"] for of in kl.values()]
    error = abs(ratios[0] - ratios[1]) / 2
    said = (tmp_path / "paper.md").read_text()
    title = "W4, RTN, groups of 32, integer zero-points, without online R3 and R4"
    assert (f"\n| {title} | OptRot, all matrices | {ratios[0]:.3f} | {ratios[1]:.3f} | "
            f"{sum(ratios) / 2:.3f} ± {error:.3f} |\n") in said
    assert said.count(f"{title} |") == 1  # the others have one seed
    script(monkeypatch, tmp_path, text, *asked, "none", "--out", str(tmp_path / "other.json"))
    assert (tmp_path / "other.json").exists()
    assert (tmp_path / "paper.md").read_text() == f"{paper_tables.BEGIN}{paper_tables.END}"


def test_the_repositorys_document_says_what_was_measured():
    said = DOCUMENT.read_text().partition(f"{paper_tables.BEGIN}\n")[2].partition(f"\n{paper_tables.END}")[0]
    by_seed = paper_tables.load_seeds()
    assert by_seed and said == "\n\n".join(
        filter(None, (paper_tables.written(by_seed[0]), paper_tables.over_seeds(by_seed))))
