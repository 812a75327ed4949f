"""`compare`: the tables and figures of the papers for one model, from rows that are measured one by one."""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path

from optrot_edge.compare.arms import ARMS
from optrot_edge.compare.options import CompareOptions, Row
from optrot_edge.compare.run import ORIGINAL, Comparison, known_tasks, learning_remarks
from optrot_edge.errors import InputError
from optrot_edge.fingerprint import differences, fingerprint
from optrot_edge.inputs import CalibrationInputs, Progress
from optrot_edge.journal import JOURNAL, Journal, Lock, commit
from optrot_edge.rotating import needs_learn, quiet, resolve_device

RESULTS = "results.json"
KIND = "compare"  # of the journal
OWN = ("work", "rotations", "results.md", "results.csv", "index.html", "figures")  # what a folder holds besides


def compare(model: str | Path, out: str | Path, *, text: str, restart: bool = False, shown: dict | None = None,
            progress: Progress = quiet, interrupted: Callable[[], bool] = lambda: False, **options) -> dict:
    """Measure `model` under every combination that `options` (CompareOptions') names against itself on `text` (a file,
    "builtin" or a hub dataset), and write tables and figures into the folder `out`; returns what `results.json` holds.

    Rows that another run finished there are kept, so lists may grow; other settings are refused unless `restart`, which
    forgets them. `shown`: lists of the tables and figures, as `CompareOptions.recorded` has them, where they are to
    hold more than is measured now. An arm that fails is a row with its reason. Raises InputError for bad input, for a
    folder that is something else or that another process writes, StorageError when the disk refuses.
    """
    needs_learn()
    from optrot_edge.compare.report import write_reports
    from optrot_edge.models import open_model
    from optrot_edge.quantize.calibration import load_text
    from optrot_edge.runtime.evaluate import tokenize_for
    from optrot_edge.runtime.text import text_sha256

    chosen, source, out = CompareOptions(**options), open_model(model), Path(out)
    whole = dataclasses.replace(chosen, **shown or {})
    recipe = _check(source, chosen)
    tasks, left_out = _tasks(chosen)
    words = load_text(text, split="test")
    tokens = tokenize_for(source.path, None, words, chosen.window, chosen.windows)
    if tokens.shape[1] > source.config.max_position_embeddings:
        raise InputError(f"--window {tokens.shape[1]} exceeds the model's context of "
                         f"{source.config.max_position_embeddings} tokens")
    device = resolve_device(recipe.device)
    lock = Lock.of(out)
    try:
        with CalibrationInputs(source, recipe, device, out / "work", progress=progress) as inputs:
            if inputs.text_sha256 == text_sha256(words):
                warnings.warn("calibration and evaluation read the same text: what learns from it looks better than it "
                              "is", stacklevel=2)
            settings = fingerprint(source, recipe, device, inputs.text_sha256)
            settings["recipe"] = chosen.settings(settings["recipe"], text_sha256(words))
            journal = _begin(out, settings | {"kind": KIND}, restart)
            run = Comparison(source, chosen, inputs, tokens, journal, progress, interrupted, tasks)
            results = lambda: _results(source, whole, journal, tasks, left_out)  # noqa: E731
            run.measure(lambda: _save(out, results()))
        found = results()
        _save(out, found)
        write_reports(out, found)
    finally:
        lock.release()
    return found


def _check(source, options: CompareOptions):
    """A recipe that has what all rows share; InputError for what the open model cannot be, before any work."""
    from optrot_edge.inputs import check_windows
    from optrot_edge.plan import check_widths

    recipes = [options.rotation_recipe(build) for build in options.builds()]
    for recipe in recipes:
        check_widths(source, recipe)
        check_windows(source, recipe)
    return recipes[0]


def _tasks(options: CompareOptions) -> tuple[dict, dict[str, str]]:
    """The zero-shot tasks, and why others are left out."""
    if not options.tasks:
        return {}, {}
    from optrot_edge.runtime.zero_shot import load_tasks

    return load_tasks(options.tasks, options.task_limit)


def _begin(out: Path, settings: dict, restart: bool) -> Journal:
    """The journal of the folder `out`, a new one if there is none or, by `restart`, what there is is forgotten."""
    remains = out.is_dir() and _is_remains(out)
    if remains and restart:
        _forget(out)
    elif remains:
        (out / f"{JOURNAL}.partial").unlink(missing_ok=True)  # of a run that was killed as it began
    journal = Journal.load(out) if out.is_dir() else None
    if journal is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds what is left of a comparison; start over with --restart" if remains else
                         f"{out} exists and is no comparison; choose another --out")
    if journal is not None and journal.settings.get("kind") != KIND:
        raise InputError(f"{out} holds another command's unfinished work; choose another --out")
    if journal is not None and restart:
        _forget(out)
        journal = None
    if journal is not None and (changed := differences(journal.settings, settings)):
        raise InputError(f"{out} holds a comparison of other settings: {'; '.join(changed)}. Go on with the former "
                         "ones, choose another --out, or start over with --restart")
    if journal is None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create {out}: {error.strerror}; choose another --out") from None
        journal = Journal(out, settings)
        journal.save()
    return journal


def _forget(out: Path) -> None:
    """Delete a comparison's files, its journal first, and nothing else that is in the folder."""
    (out / JOURNAL).unlink(missing_ok=True)
    for name in (RESULTS, *OWN):
        for path in (out / name, out / f"{name}.partial"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_remains(out: Path) -> bool:
    """Whether the folder `out` holds nothing but a comparison's files, be its journal damaged, another version's or, of
    a restart that was killed, gone."""
    names = {path.name.removesuffix(".partial") for path in out.iterdir()}
    if not names or names - {JOURNAL, RESULTS, *OWN}:
        return False
    try:
        journal = Journal.load(out)
    except InputError:
        return True
    return journal is None or journal.settings.get("kind") == KIND


def _results(source, options: CompareOptions, journal: Journal, tasks: dict, left_out: dict[str, str]) -> dict:
    """All that is known of the rows asked for, as JSON; of zero-shot accuracies those in `tasks`, with the reasons why
    others are left out."""
    rows, builds = [_row(row, journal) | _accuracies(row, journal, tasks) for row in options.rows()], options.builds()
    zero_shot = {"tasks": list(tasks), "limit": options.task_limit, "left_out": left_out,
                 "original": known_tasks(journal, ORIGINAL, tasks)}
    rotations = {build.rotation: build for build in builds}
    about = lambda name, key: (journal.about(name) or {}).get(key)  # noqa: E731
    return {"format": "optrot-compare", "version": 1, "model": source.config.name or Path(source.path).stem,
            "settings": journal.settings, "lists": options.recorded(), "reference": journal.about("reference"),
            "rows": rows, **({"zero_shot": zero_shot} if options.tasks else {}),
            "quantities": {name: {"arm": build.arm, "bits": build.bits if ARMS[build.arm].per_grid else None,
                                  "online": build.online, "layers": layers}
                           for name, build in rotations.items()
                           if (layers := about(f"quantities {name}", "layers"))},
            "errors": {build.name: layers for build in builds if (layers := about(f"errors {build.name}", "layers"))},
            "curves": {name: curve for name in rotations
                       if (curve := about(f"rotations/{name}.safetensors", "loss_curve"))}}


def _accuracies(row: Row, journal: Journal, tasks: dict) -> dict:
    """What is added to a row when accuracies are wanted: them, or why they are not there."""
    if not tasks:
        return {}
    scores = known_tasks(journal, row.name, tasks)
    reason = (journal.about(f"tasks {row.name}") or {}).get("reason", "not measured yet")
    return {"zero_shot": scores} | ({} if scores.keys() == tasks.keys() else {"zero_shot_reason": reason})


def _row(row: Row, journal: Journal) -> dict:
    build = row.build
    found = {"name": row.name, "arm": build.arm, "label": ARMS[build.arm].label_at(build.bits), "bits": build.bits,
             "quantizer": build.quantizer, "online": build.online, "activations": row.activations, "build": build.name,
             "rotation": build.rotation, **(journal.about(f"row {row.name}") or
                                            {"status": "pending", "reason": "not measured yet"})}
    errors = journal.about(f"errors {build.name}")
    if errors is not None:
        values = [entry["snr_db"] for entry in errors["layers"] if entry["snr_db"] is not None]
        found |= {"snr_db": statistics.fmean(values) if values else None, "warnings": errors["warnings"],
                  "bytes": errors["bytes"], "bits_per_weight": errors["bits_per_weight"]}
    return found | learning_remarks(row, journal)


def _save(out: Path, results: dict) -> None:
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    commit(out / RESULTS, lambda partial: partial.write_text(text, encoding="utf-8"))
