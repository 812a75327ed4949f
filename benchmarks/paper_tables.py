"""The paper's tables (arXiv 2512.24124) for SmolLM2-135M: `optrot-edge compare` in the paper's setting.

    python benchmarks/paper_tables.py --text wiki.test.raw --calibration c4.txt

The dithered testbed (`testbed.py`) stands for the float model. GPTQ on 512 × 256 calibration tokens with damping 0.01,
4 and 3 bits with integer zero-points, round-to-nearest beside it, with and without online R3 and R4, activations in 16,
8 and 4 bits. Groups are of 192, which divides this model's rows of 576 and 1,536; the
paper's are of 256. OptRot: 1000 Cayley steps on all rows, as published; `--solver polar` is the fast one. Without
`--calibration` the text is cut in two as `texts.py` does.

The folder `--work`/paper holds the comparison, with figures and a page; a second run goes on there. Its journal, with
all that is measured, is kept in `--journal` too, from which a run without that folder goes on: on another machine (the
repository's needs OMP_NUM_THREADS=1 and, beyond AVX2, ATEN_CPU_CAPABILITY=avx2), or for the figures alone. What either
has measured is joined, so lists may be measured in parts, by several runs with a `--work` each. What tables need is
written to `--out`, also what there is of a run that Ctrl-C stopped; it holds whatever the journal had measured when the
run began.

The part of docs/paper.md between the marks is written from the JSON in `benchmarks/results`, so not by a run with
another `--out`; `--write` does only that. Another `--seed` (of the random Hadamards and the calibration windows) is a
comparison with files of its own, of which the document has the ratios.
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
from optrot_edge.compare.options import ONLINE, QUANTIZERS, CompareOptions
from optrot_edge.compare.run import is_measured
from optrot_edge.compare.tables import BASE, COLUMNS, about, tables
from optrot_edge.errors import InputError
from optrot_edge.fingerprint import differences
from optrot_edge.journal import JOURNAL, Journal, Lock, commit
from optrot_edge.terminal import Reporter, print_comparison

HERE = Path(__file__).resolve().parent
RESULTS_FOLDER = HERE / "results"
DOCUMENT = HERE.parent / "docs" / "paper.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
QUANTITIES = ("mu_w", "mu_h", "mu_w_mu_h", "tr_d_over_tr_h")


def measure(options: argparse.Namespace) -> None:
    """Run or finish the comparison and print it; what is measured is kept in `--journal` and `--out`, even when Ctrl-C
    stops it."""
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
    folder, refused = options.work / f"paper{of_seed(options.seed)}", False
    shown = widened(lists, restore_journal(options.journal, folder))
    before = written_at(folder / RESULTS)
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
            if written_at(folder / RESULTS) != before:
                save(options.out, shortened(json.loads((folder / RESULTS).read_text(encoding="utf-8"))))
    print_comparison(json.loads(options.out.read_text(encoding="utf-8")), folder)


def of_seed(seed: int) -> str:
    """What the names of a seed's files have besides."""
    return f"-seed{seed}" if seed else ""


def written_at(path: Path) -> int | None:
    """When the file was written; None without one."""
    return path.stat().st_mtime_ns if path.exists() else None


def widened(lists: dict, entries: dict) -> dict:
    """`lists` with those of every row that a journal's `entries` have measured, so that measuring in parts loses no
    table."""
    every = CompareOptions(list(ARMS), bits=list(range(2, 9)), group_size=192, quantizers=list(QUANTIZERS),
                           activations=list(ACTIVATIONS), online="both")
    journal = Journal(Path(), {}, entries)
    rows = [row for row in every.rows() if is_measured(journal, row)]
    kept = lambda name, values: sorted({*lists[name], *values})  # noqa: E731
    online = {row.build.online for row in rows if ARMS[row.build.arm].takes_online} | set(ONLINE[lists["online"]])
    return {"rotations": sorted({*lists["rotations"], *(row.build.arm for row in rows)}, key=list(ARMS).index),
            "bits": kept("bits", (row.build.bits for row in rows))[::-1],
            "activations": kept("activations", (row.activations for row in rows))[::-1],
            "quantizers": kept("quantizers", (row.build.quantizer for row in rows)),
            "online": "both" if len(online) == 2 else lists["online"]}


def joined(one: dict, other: dict) -> dict:
    """The entries of two journals of the same settings: what is measured goes before what failed or was skipped, and of
    zero-shot tasks there are the scores of both."""
    found = {**other, **one}
    for name in one.keys() & other.keys():
        mine, theirs = one[name]["about"], other[name]["about"]
        if theirs.get("status") == "measured" != mine.get("status"):
            found[name] = other[name]
        if name.startswith("tasks "):
            scores = theirs.get("scores", {}) | mine.get("scores", {})
            found[name] = {"about": found[name]["about"] | ({"scores": scores} if scores else {})}
    return found


def load_archive(archive: Path) -> dict | None:
    """The journal kept in `archive`: its `settings` and `entries`; None without one."""
    return json.loads(gzip.decompress(archive.read_bytes())) if archive.is_file() else None


def restore_journal(archive: Path, folder: Path) -> dict:
    """Have the comparison in `folder` go on with what it and `archive` have measured; its entries.

    InputError when the two are of other settings.
    """
    with Lock.of(folder):
        stored, mine = load_archive(archive), Journal.load(folder)
        if stored is None:
            return {} if mine is None else mine.entries
        if mine is not None and (changed := differences(stored["settings"], mine.settings)):
            raise InputError(f"{archive} and {folder} hold comparisons of other settings: {'; '.join(changed)}. Choose "
                             "another --work, or another --journal with its own --out")
        entries = stored["entries"] if mine is None else joined(mine.entries, stored["entries"])
        if mine is None or entries != mine.entries:
            folder.mkdir(parents=True, exist_ok=True)
            Journal(folder, stored["settings"] if mine is None else mine.settings, entries).save()
        return entries


def keep_journal(folder: Path, archive: Path) -> None:
    """Compress what `folder` and `archive` have measured so far to `archive`, equal journals to equal bytes."""
    if not (folder / JOURNAL).exists():
        return
    with Lock(archive.with_name(archive.name + ".lock")):
        restore_journal(archive, folder)  # what another run has put there since
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


def over_seeds(by_seed: dict[int, dict]) -> str:
    """A table of the arms' KL as shares of the Hadamard's of the same seed, where several seeds have them."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for seed, results in by_seed.items():
        for table in tables(results):
            kl = {row["arm"]: row["kl_mean"] for row in table["rows"] if row["status"] == "measured"}
            for row in table["rows"]:
                if row["arm"] != BASE and {row["arm"], BASE} <= kl.keys():
                    found.setdefault((table["title"], row["label"]), {})[seed] = kl[row["arm"]] / kl[BASE]
    several = {key: ratios for key, ratios in found.items() if len(ratios) > 1}
    if not several:
        return ""
    seeds = sorted({seed for ratios in several.values() for seed in ratios})
    lines = ["### Several seeds: KL as a share of the Hadamard's of the same seed", "",
             "| setting | arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean ± standard error |",
             "|---" * (len(seeds) + 3) + "|"]
    for (title, label), ratios in several.items():
        each = [f"{ratios[seed]:.3f}" if seed in ratios else "" for seed in seeds]
        error = statistics.stdev(ratios.values()) / len(ratios) ** 0.5
        lines.append(f"| {title} | {label} | " + " | ".join(each)
                     + f" | {statistics.fmean(ratios.values()):.3f} ± {error:.3f} |")
    return "\n".join(lines)


def load_seeds(folder: Path = RESULTS_FOLDER) -> dict[int, dict]:
    """The results in `folder` by their seed, that of the tables (0) first."""
    paths = [folder / "paper_tables.json", *sorted(folder.glob("paper_tables-seed*.json"))]
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    return {results["settings"]["recipe"]["seed"]: results for results in found}


def write_document(by_seed: dict[int, dict], document: Path = DOCUMENT) -> None:
    """Put the tables of seed 0, and the ratios of all, between the marks of `document`."""
    said = "\n\n".join(filter(None, (written(by_seed[0]), over_seeds(by_seed))))
    before, _, rest = document.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    document.write_text(f"{before}{BEGIN}\n{said}\n{END}{after}", encoding="utf-8")


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
    parser.add_argument("--out", type=Path, help="(default: benchmarks/results/paper_tables.json; of a --seed its own)")
    parser.add_argument("--journal", type=Path, help="(default: beside --out)")
    parser.add_argument("--write", action="store_true", help="write the document; measure nothing")
    options = parser.parse_args()
    own = RESULTS_FOLDER / f"paper_tables{of_seed(options.seed)}.json"
    options.out = options.out or own
    options.journal = options.journal or options.out.with_suffix(".journal.json.gz")
    if not options.write:
        try:
            measure(options)
        except InputError as error:
            sys.exit(f"error: {error}")
    if options.write or options.out == own:
        write_document(load_seeds())
        Console().print(f"written to {DOCUMENT}")


if __name__ == "__main__":
    main()
