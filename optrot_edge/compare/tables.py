"""The tables of a comparison, as rows of text: for the terminal, Markdown, CSV and the page."""

from __future__ import annotations

import csv
import io
import itertools

import numpy as np

from optrot_edge.compare.arms import ARMS

COLUMNS = ("arm", "KL (nats)", "of QuaRot (95 %)", "perplexity", "top-1", "SNR (dB)", "MB")
ZERO_SHOT = "zero-shot"  # the column that tables have besides when tasks were asked for and could be had
CSV_COLUMNS = ("arm", "bits", "activations", "quantizer", "online", "status", "reason", "kl_mean", "kl_se", "kl_median",
               "kl_p90", "kl_p99", "ppl", "ppl_se", "top1", "top1_se", "snr_db", "bytes", "bits_per_weight",
               "not_reproduced", "zero_shot_mean", "zero_shot_se")
OFFSETS = {"zero": "integer zero-points", "min": "float offsets", "sym": "symmetric"}
BASE = "hadamard"  # what ratios are to, when it is among the rows


def setting(row: dict) -> tuple:
    """What the rows of one table have in common."""
    return row["bits"], row["activations"], row["quantizer"], row["online"]


def title(bits: int, activations: int, quantizer: str, online: bool, grid: str) -> str:
    """Caption of a table."""
    width = f"W{bits}" if activations == 16 else f"W{bits}A{activations}"
    return f"{width}, {quantizer.upper()}, {grid}, {'with' if online else 'without'} online R3 and R4"


def columns(results: dict) -> tuple[str, ...]:
    """Headings of the tables."""
    return COLUMNS + (ZERO_SHOT,) * has_tasks(results)


def has_tasks(results: dict) -> bool:
    """Whether there are zero-shot tasks whose data could be had."""
    return bool(results.get("zero_shot", {}).get("tasks"))


def tables(results: dict) -> list[dict]:
    """`title`, `rows` (of `results`), `cells` (`columns` as text) and `notes` of every table, arms in the order they
    were asked for; those that R3 and R4 do not go with stand in the tables with and without."""
    shared = results["settings"]["recipe"]
    grid = f"groups of {shared['group_size']}, {OFFSETS[shared['grid']]}"
    rows, found = results["rows"], []
    lists = results["lists"]
    accuracies = lambda row: [_accuracy(row.get("zero_shot", {}))] * has_tasks(results)  # noqa: E731
    online = {"no": (False,), "yes": (True,), "both": (False, True)}[lists["online"]]
    for bits, quantizer, on, activations in itertools.product(*(dict.fromkeys(values) for values in (
            lists["bits"], lists["quantizers"], online, lists["activations"]))):
        of = sorted((row for row in rows if setting(row)[:3] == (bits, activations, quantizer)
                     and (row["online"] == on or not ARMS[row["arm"]].takes_online)),
                    key=lambda row: lists["rotations"].index(row["arm"]))
        base = next((row for row in of if row["arm"] == BASE and row["status"] == "measured"), None)
        found.append({"title": title(bits, activations, quantizer, on, grid), "rows": of, "online": on,
                      "cells": [cells(row, base) + accuracies(row) for row in of],
                      "notes": [f"{row['label']}: {said}" for row in of if (said := remarks(row))]})
    return found


def cells(row: dict, base: dict | None) -> list[str]:
    """A row's COLUMNS."""
    snr = "" if row.get("snr_db") is None else f"{row['snr_db']:.2f}"
    size = "" if row.get("bytes") is None else f"{row['bytes'] / 1e6:.1f}"
    if row["status"] != "measured" or row["kl_mean"] is None:
        said = "not finite" if row["status"] == "measured" else row["status"]
        return [row["label"], said, "", "", "", snr, size]
    return [row["label"], with_error(row["kl_mean"], row["kl_se"], kl_digits(row["kl_mean"])), ratio(row, base),
            with_error(row["ppl"], row["ppl_se"], 3), with_error(100 * row["top1"], 100 * row["top1_se"], 1, " %"), snr,
            size]


def kl_digits(kl: float) -> int:
    """Decimals of a KL in nats: that of 8 bits is less than 0.001."""
    return 4 if kl >= 0.001 else 6


def mean_accuracy(scores: dict) -> tuple[float, float | None]:
    """Mean over tasks of what `score_tasks` gives, and its standard error."""
    errors = [score["se"] for score in scores.values()]
    mean = float(np.mean([score["accuracy"] for score in scores.values()]))
    return mean, None if None in errors else float(np.sqrt(np.square(errors).sum())) / len(errors)


def _accuracy(scores: dict) -> str:
    """The column's cell."""
    if not scores:
        return ""
    mean, error = mean_accuracy(scores)
    return with_error(100 * mean, None if error is None else 100 * error, 1, " %")


def with_error(value: float, error: float | None, digits: int, unit: str = "") -> str:
    """`value` ± its standard error."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}") + unit


def ratio(row: dict, base: dict | None) -> str:
    """A row's KL to that of `base`, with a paired bootstrap interval over windows."""
    from optrot_edge.runtime.metrics import paired_bootstrap

    if base is None or base["kl_mean"] is None:
        return ""
    if row is base:
        return "1"
    ours, theirs = (np.array(one["window_kl"]) for one in (row, base))
    if len(ours) < 2:
        return f"{ours.mean() / theirs.mean():.3f}"
    found = paired_bootstrap(ours, theirs)
    return f"{found.ratio:.3f} ({found.low:.3f}-{found.high:.3f})"


def remarks(row: dict) -> str:
    """What has to be known of a row besides its numbers."""
    if row["status"] != "measured":
        return f"{row['status']}: {row['reason']}"
    found = []
    if row["not_reproduced"]:
        found.append(f"not reproduced: {row['not_reproduced']}")
    if row["learning"]:
        learning = row["learning"]
        tokens = f" of {learning['tokens_per_step']:,} tokens" if learning["tokens_per_step"] else ""
        found.append(f"{learning['steps']} steps{tokens}, loss {learning['loss_start']:.6g} to {learning['loss']:.6g}")
    if "zero_shot_reason" in row:
        found.append(f"zero-shot: {row['zero_shot_reason']}")
    return "; ".join(found + row.get("warnings", []))


def markdown(results: dict) -> str:
    """Every table."""
    headings = columns(results)
    lines = [f"# {results['model']}", "", *(f"{line}  " for line in about(results)), ""]
    for table in tables(results):
        lines += [f"## {table['title']}", "", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        lines += ["| " + " | ".join(row) + " |" for row in table["cells"]] + [""]
        lines += [f"* {note}" for note in table["notes"]] + [""] * bool(table["notes"])
    return "\n".join(lines)


def about(results: dict) -> list[str]:
    """What all rows share, in sentences."""
    shared = results["settings"]["recipe"]
    order = "act-order" if shared["act_order"] else "stored order"
    said = [f"Calibration: {shared['nsamples']} × {shared['seqlen']} tokens of {shared['calibration']}; "
            f"GPTQ with damping {shared['damp']:g}, {order}; rounding to nearest sees no text. Embedding and head stay "
            "float16."]
    scored = next((row for row in results["rows"] if row["status"] == "measured"), None)
    if scored:
        said.append(f"Evaluation: {scored['windows']} windows, {scored['tokens']:,} positions; decoded weights in "
                    f"float32 torch against the float model, whose perplexity is "
                    f"{with_error(results['reference']['ppl'], results['reference']['ppl_se'], 3)}.")
    said.append("KL ± one standard error over positions; its ratio to QuaRot's with a paired bootstrap interval over "
                "windows. SNR: mean over layers and matrices of 10 log10(tr WHWᵀ / tr (W−Ŵ)H(W−Ŵ)ᵀ), H of the float "
                "model's inputs. MB: all tensors as stored.")
    online = [arm.label for arm in ARMS.values() if arm.analysis and arm.name in results["lists"]["rotations"]]
    if online:
        said.append(f"MB of {', '.join(online)}: without their transforms, which run online; their SNR: of the bits of "
                    "activations that were measured first.")
    return said + ([_about_tasks(results["zero_shot"])] if "zero_shot" in results else [])


def _about_tasks(zero_shot: dict) -> str:
    """Which tasks there are, what the float model has in them, and which could not be had."""
    said, scores = "", zero_shot["original"]
    if zero_shot["tasks"]:
        of = lambda score: f" ({score['metric']}, {score['items']:,} items)"  # noqa: E731
        names = ", ".join(name + (of(scores[name]) if name in scores else "") for name in zero_shot["tasks"])
        said = f"Zero-shot: mean accuracy in {names}, by lm-eval." + (
            f" The float model has {_accuracy(scores)}." if scores else "")
    if zero_shot["left_out"]:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in zero_shot["left_out"].items())
        said += f"{' ' * bool(said)}Zero-shot tasks left out, for they cannot be loaded: {reasons}."
    return said


def as_csv(results: dict) -> str:
    """A line per row, with CSV_COLUMNS."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in results["rows"]:
        accuracy = zip(("zero_shot_mean", "zero_shot_se"), mean_accuracy(row["zero_shot"]), strict=True) if row.get(
            "zero_shot") else ()
        writer.writerow(row | dict(accuracy))
    return stream.getvalue()
