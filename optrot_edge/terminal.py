"""What people see: one progress line with ETA and memory, and short tables."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def resident_bytes() -> int:
    """Peak resident memory of this process."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Reporter:
    """A progress line on standard error; `update(stage, done, total, note)` is what pipelines call."""

    def __init__(self, enabled: bool = True):
        self.progress = Progress(
            TextColumn("{task.description:<18}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=Console(stderr=True), disable=not enabled)
        self.tasks: dict[str, int] = {}

    def __enter__(self) -> Reporter:
        self.progress.start()
        return self

    def __exit__(self, *exc) -> None:
        self.progress.stop()

    def update(self, stage: str, done: int, total: int, note: str) -> None:
        """Show that `stage` stands at `done` of `total`."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=total, note="")
        note = f"{resident_bytes() / 2**30:.1f} GiB  {note}"
        self.progress.update(self.tasks[stage], completed=done, total=total, note=note)


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _readable(name: str, value) -> str:
    if "bytes" in name.split("_"):
        return _size(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def print_rows(result: dict, title: str) -> None:
    """Scalar entries of `result` as a two-column table."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in result.items():
        nested = isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict | list))
        if not nested and value not in (None, [], ""):
            table.add_row(name.replace("_", " "), escape(_readable(name, value)))
    Console().print(table)


def print_plan(plan: dict) -> None:
    """A dry run."""
    rows = {key: value for key, value in plan.items() if key not in ("bytes_by_part", "types", "arms")}
    rows |= {f"{part} ({plan['types'].get(part, 'f32')})": _size(size)
             for part, size in plan["bytes_by_part"].items()}
    rows["seconds"] = f"about {plan['seconds']} on this machine's CPU"
    print_rows(rows, "Dry run: nothing was written")


def print_inspection(about: dict) -> None:
    """What `inspect` found, with per-type and per-layer tables when there are any."""
    print_rows({name: value for name, value in about.items() if name != "warnings"}, about.get("kind", ""))
    if about.get("types"):
        table = Table("type", "tensors", "weights", title="Types", title_justify="left")
        for name, entry in about["types"].items():
            table.add_row(name, str(entry["tensors"]), f"{entry['weights']:,}")
        Console().print(table)
    if about.get("layers_snr_db"):
        table = Table("layer", "worst SNR dB", "matrix", "worse than rounding", "damping grew", title="Per layer",
                      title_justify="left")
        for index, entry in enumerate(about["layers_snr_db"]):
            table.add_row(str(index), f"{entry['snr_db']:.2f}", entry["matrix"], ", ".join(entry["worse_than_rtn"]),
                          ", ".join(entry["damping_grew"]))
        Console().print(table)
    for said in about.get("warnings", ()):
        Console().print(f"warning: {said}", markup=False, highlight=False, style="yellow")


def print_rotation(summary: dict) -> None:
    """A rotation, and the medians over the layers of what it changes."""
    print_rows(summary, "Rotation")
    names = {"mu_w": "μ_W", "mu_h": "μ_H", "mu_w_mu_h": "μ_W μ_H"}
    table = Table("matrix", *names.values(), "cost ratio", title="Median over layers, before → after",
                  title_justify="left", caption="cost ratio: ‖W‖² tr D, after / before", caption_justify="left")
    for row in summary["matrices"]:
        pairs = ((row[f"{name}_before"], row[f"{name}_after"]) for name in names)
        cells = ("-" if after is None else f"{before:.3g} → {after:.3g}" for before, after in pairs)
        ratio = row["tr_d_ratio"]
        table.add_row(row["matrix"], *cells, "-" if ratio is None else f"{ratio:.3g}")
    Console().print(table)


def print_report(report: dict) -> None:
    """The verdict of an evaluation."""
    def cell(name: str, form: str) -> str:
        value, error = report.get(name), report.get(f"{name.removesuffix('_mean')}_se")
        if value is None:
            return "not finite" if report.get("nonfinite") else "-"
        return form.format(value) + ("" if error is None else " ± " + form.format(error))

    table = Table(title=f"{report['package']} against {report['reference']}", show_header=False, title_justify="left")
    bound = " (lower bound)" if report.get("kl_is_lower_bound") else ""
    table.add_row(f"KL divergence, mean (nats){bound}", cell("kl_mean", "{:.4f}"))
    table.add_row("KL median / p90 / p99", " / ".join(cell(f"kl_{q}", "{:.4f}") for q in ("median", "p90", "p99")))
    table.add_row("perplexity", cell("ppl", "{:.3f}"))
    table.add_row("perplexity of the reference", cell("ppl_reference", "{:.3f}"))
    table.add_row("top-1 agreement", cell("top1", "{:.4f}"))
    if report.get("kl_is_lower_bound"):
        table.add_row("KL, unbiased estimate", cell("kl_estimate", "{:.4f}"))
        table.add_row("KL at most", cell("kl_upper_bound", "{:.4f}"))
    if report.get("nonfinite"):
        table.add_row("non-finite logits", str(report["nonfinite"]), style="bold red")
    if report.get("activations"):
        table.add_row("activations rounded to", f"{report['activations']} bits")
    table.add_row("size", f"{_size(report['bytes'])}, {report['bits_per_weight']:.3f} bits per weight")
    if report.get("decode_tokens_per_s"):
        table.add_row("tokens/s, prefill / decode",
                      f"{report['prefill_tokens_per_s']:.0f} / {report['decode_tokens_per_s']:.0f}")
    cache = f", keys and values in {report['kv_bits']} bits" if report.get("kv_bits") else ""
    if "kv_type" in report:
        rotated = report["kv_rotation"]
        cache = f", KV cache {report['kv_type']}" + (f", {' and '.join(rotated)} rotated" if rotated else "")
    level = f", accuracy level {report['accuracy_level']}" if "accuracy_level" in report else ""
    table.add_row("scored", f"{report['tokens']:,} tokens in {report['runtime']}{cache}{level}")
    if "first_position" in report:
        table.add_row("positions scored", f"{report['first_position']} to {report['window'] - 2} of every window")
    Console().print(table)


def print_comparison(results: dict, out) -> None:
    """The tables of a comparison, and where the rest is."""
    from optrot_edge.compare.tables import ZERO_SHOT, about, columns, has_tasks, tables

    shown = ("arm", "KL (nats)", "of QuaRot (95 %)", "perplexity") + (ZERO_SHOT,) * has_tasks(results)
    for found in tables(results):
        table = Table(*shown, title=found["title"], title_justify="left")
        for row, cells in zip(found["rows"], found["cells"], strict=True):
            named = dict(zip(columns(results), cells, strict=True)) | {"arm": row["arm"]}
            table.add_row(*(escape(named[column]) for column in shown))
        Console().print(table)
        for note in found["notes"]:
            Console().print(f"  {note}", markup=False, highlight=False, style="dim")
    if "zero_shot" in results:
        Console().print(about(results)[-1], markup=False, highlight=False)
    Console().print(f"{out}/index.html has all of it, with figures", markup=False, highlight=False, soft_wrap=True)


def print_doctor(result: dict) -> None:
    """A row per runtime, device and extra."""
    table = Table("", "name", "", "how to get it")
    for row in result["rows"]:
        mark = "[green]yes[/]" if row["usable"] else "[red]no[/]"
        table.add_row(mark, *(escape(row[key]) for key in ("name", "detail", "install")))
    Console().print(table)
