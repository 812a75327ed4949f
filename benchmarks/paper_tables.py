"""The paper's tables (arXiv 2512.24124) for SmolLM2-135M: `optrot-edge compare` in the paper's setting.

    python benchmarks/paper_tables.py --text wiki.test.raw --calibration c4.txt

The dithered testbed (`testbed.py`) stands for the float model. GPTQ on 512 × 256 calibration tokens with damping 0.01,
4 and 3 bits with integer zero-points, round-to-nearest beside it, with and without online R3 and R4, activations in 16,
8 and 4 bits. Groups are of 192, which divides this model's rows of 576 and 1,536; the
paper's are of 256. OptRot: 1000 Cayley steps on all rows, as published; `--solver polar` is the fast one. Without
`--calibration` the text is cut in two as `texts.py` does.

The folder `--work`/paper holds the comparison, with figures and a page; a second run goes on there. Its journal, with
all that is measured, is kept in `--journal` too, from which a run without that folder goes on: on another machine (the
repository's needs OMP_NUM_THREADS=1 and, beyond AVX2, ATEN_CPU_CAPABILITY=avx2), or for the figures alone; rows that
only one of the two has are joined. What tables need is written to `--out`, also what there is of a run that Ctrl-C
stopped; and from that the part of docs/paper.md between the marks; `--write` does only that. Lists may be measured in
parts: what `--out` has besides stays in the tables.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
from pathlib import Path

from rich.console import Console
from rotations import save
from testbed import build_testbed
from texts import load_text

from optrot_edge.cli_options import listed
from optrot_edge.compare.arms import ACTIVATIONS, ARMS
from optrot_edge.compare.comparison import RESULTS, compare
from optrot_edge.compare.tables import COLUMNS, about, tables
from optrot_edge.errors import InputError
from optrot_edge.fingerprint import differences
from optrot_edge.journal import JOURNAL, Journal, Lock, commit
from optrot_edge.terminal import Reporter, print_comparison

HERE = Path(__file__).resolve().parent
DOCUMENT = HERE.parent / "docs" / "paper.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
QUANTITIES = ("mu_w", "mu_h", "mu_w_mu_h", "tr_d_over_tr_h")


def measure(options: argparse.Namespace) -> None:
    """Run or finish the comparison; what is measured is kept in `--journal` and `--out`, even when Ctrl-C stops it."""
    options.work.mkdir(parents=True, exist_ok=True)
    text = load_text(options.text)
    files = {"evaluation": options.work / "paper-evaluation.txt", "calibration": options.work / "paper-calibration.txt"}
    for name, path in files.items():
        path.write_text(getattr(text, name), encoding="utf-8")
    fields = {"calibration": options.calibration or str(files["calibration"]), "nsamples": options.nsamples,
              "seqlen": 256, "damp": 0.01, "r4_block": 512, "optrot_solver": options.solver, "seed": options.seed,
              "device": options.device}
    lists = {"rotations": listed(options.rotations), "bits": listed(options.bits, int),
             "quantizers": listed(options.quantizers), "activations": listed(options.activations, int),
             "online": options.online}
    folder, refused = options.work / "paper", False
    shown = widened(lists, options.out) if restore_journal(options.journal, folder) else None
    try:
        with Reporter() as reporter:
            compare(build_testbed(options.work / "testbed"), folder, text=str(files["evaluation"]), group_size=192,
                    **lists, shown=shown, windows=options.windows, window=256, max_minutes=options.max_minutes,
                    fields=fields, progress=reporter.update)
    except InputError:
        refused = True
        raise
    finally:
        if not refused:
            keep_journal(folder, options.journal)
            if (folder / RESULTS).exists():
                save(options.out, shortened(json.loads((folder / RESULTS).read_text(encoding="utf-8"))))


def widened(lists: dict, out: Path) -> dict:
    """`lists` with what the JSON at `out`, if there is one, has besides, so that measuring in parts loses no table."""
    before = json.loads(out.read_text(encoding="utf-8"))["lists"] if out.is_file() else lists
    return {"rotations": sorted({*lists["rotations"], *before["rotations"]}, key=list(ARMS).index),
            **{name: sorted({*lists[name], *before[name]}, reverse=True) for name in ("bits", "activations")},
            "quantizers": sorted({*lists["quantizers"], *before["quantizers"]}),
            "online": lists["online"] if lists["online"] == before["online"] else "both"}


def restore_journal(archive: Path, folder: Path) -> bool:
    """Have the comparison in `folder` go on where `archive` ends, with the rows of both; whether there is an archive.

    InputError when the two are of other settings.
    """
    if not archive.is_file():
        return False
    stored = json.loads(gzip.decompress(archive.read_bytes()))
    with Lock(folder.with_name(folder.name + ".lock")):
        kept, mine = Journal(folder, stored["settings"], stored["entries"]), Journal.load(folder)
        if mine is not None and (changed := differences(kept.settings, mine.settings)):
            raise InputError(f"{archive} and {folder} hold comparisons of other settings: {'; '.join(changed)}. Choose "
                             "another --work, or another --journal with its own --out")
        if mine is None:
            folder.mkdir(parents=True, exist_ok=True)
            kept.save()
        elif missing := {name: entry for name, entry in kept.entries.items() if name not in mine.entries}:
            mine.entries |= missing
            mine.save()
    return True


def keep_journal(folder: Path, archive: Path) -> None:
    """Compress what `folder` has measured so far to `archive`, equal journals to equal bytes."""
    if (folder / JOURNAL).exists():
        packed = gzip.compress((folder / JOURNAL).read_bytes(), mtime=0)
        commit(archive, lambda partial: partial.write_bytes(packed))


def shortened(results: dict) -> dict:
    """The results without a row per layer and matrix: medians of the quantities, and the mean SNR of every matrix."""
    medians = {name: {key: statistics.median(row[key] for row in entry["layers"]) for key in QUANTITIES}
               for name, entry in results["quantities"].items()}
    snr = {}
    for name, rows in results["errors"].items():
        of: dict[str, list[float]] = {}
        for row in rows:
            of.setdefault(row["matrix"], []).extend([] if row["snr_db"] is None else [row["snr_db"]])
        snr[name] = {matrix: statistics.fmean(values) if values else None for matrix, values in of.items()}
    return {name: value for name, value in results.items() if name not in ("quantities", "errors", "curves")} | {
        "medians": medians, "snr_db": snr}


def written(results: dict) -> str:
    """What stands between the marks of the document: tables of which a row is measured."""
    lines = [f"{line}  " for line in about(results)]
    for table in tables(results):
        if all(row["status"] != "measured" for row in table["rows"]):
            continue
        lines += ["", f"### {table['title']}", "", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row) + " |" for row in table["cells"]]
        lines += [""] * bool(table["notes"]) + [f"* {note}" for note in table["notes"]]
    lines += ["", "### Medians over layers and matrices", "", "| rotation | μ_W | μ_H | μ_W μ_H | tr D / tr H |",
              "|---|---|---|---|---|"]
    lines += [f"| {name} | " + " | ".join(f"{entry[key]:.3g}" for key in QUANTITIES) + " |"
              for name, entry in results["medians"].items()]
    return "\n".join(lines)


def write_document(results: dict, document: Path = DOCUMENT) -> None:
    """Put `results` between the marks of `document`."""
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}\n{written(results)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Measure, write the JSON and the document, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="text to evaluate on (default: WikiText-2)")
    parser.add_argument("--calibration", help="text to calibrate on (default: the last 30 %% of --text)")
    parser.add_argument("--rotations", default=",".join(ARMS), help="arms, with commas (default: all there are)")
    parser.add_argument("--bits", default="4,3", help="of the weights (default: %(default)s)")
    parser.add_argument("--quantizers", default="gptq,rtn", help="(default: %(default)s)")
    parser.add_argument("--activations", default=",".join(map(str, ACTIVATIONS)), help="bits (default: %(default)s)")
    parser.add_argument("--online", default="both", choices=("no", "yes", "both"))
    parser.add_argument("--solver", default="cayley", choices=("cayley", "polar"))
    parser.add_argument("--nsamples", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-minutes", type=float, help="leave out what would not end within this")
    parser.add_argument("--work", type=Path, default=Path("out/benchmarks"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "paper_tables.json")
    parser.add_argument("--journal", type=Path, default=HERE / "results" / "paper_tables.journal.json.gz")
    parser.add_argument("--write", action="store_true", help="write the document from --out; measure nothing")
    options = parser.parse_args()
    if not options.write:
        try:
            measure(options)
        except InputError as error:
            sys.exit(f"error: {error}")
    results = json.loads(options.out.read_text(encoding="utf-8"))
    write_document(results)
    if not options.write:
        print_comparison(results, options.work / "paper")
    Console().print(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
