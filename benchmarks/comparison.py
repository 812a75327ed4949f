"""What the benchmark's rows say: ratios with intervals, the bars, the tables. No measuring here.

A row is one arm: `type`, `method` ("stock", "stock-pure", "none", "none-permuted", "hadamard",
"optrot"), `seed`, `torch` and `llama` scores, `bytes`, `shipping` rows.
"""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from scoring import bootstrap_ratio, standard_error

BARS = {"q4_0": 0.45, "q4_1": 0.75}  # best of our arms at most this share of stock's KL
CONTROLS = ("stock-permuted", "none-permuted")


def is_ours(method: str) -> bool:
    """Whether an arm is this project's and counts for the bar (controls do not)."""
    return not method.startswith("stock") and method not in CONTROLS


def groups(rows: dict[str, dict], kind: str) -> dict[str, list[dict]]:
    """Rows of one type by method, in order of first appearance."""
    found: dict[str, list[dict]] = {}
    for row in rows.values():
        if row["type"] == kind:
            found.setdefault(row["method"], []).append(row)
    return found


def _ratio(arms: list[dict], stock: dict, column: str) -> dict | None:
    if any(column not in row for row in [*arms, stock]):
        return None
    kls = np.array([row[column]["kl_windows"] for row in arms])
    return {"kl": float(kls.mean()), "kl_standard_error": standard_error(kls.mean(0).tolist()),
            "ppl": float(np.exp(np.mean([np.log(row[column]["ppl"]) for row in arms]))),
            "top1": float(np.mean([row[column]["top1"] for row in arms])),
            **bootstrap_ratio(kls, np.array(stock[column]["kl_windows"]))}


def summarise(rows: dict[str, dict]) -> list[dict]:
    """One entry per type that has a stock row: every method's mean over seeds, each seed, the bar."""
    entries = []
    for kind in dict.fromkeys(row["type"] for row in rows.values()):
        by_method = groups(rows, kind)
        if "stock" not in by_method:
            continue
        stock = by_method["stock"][0]
        methods = {}
        for method, arms in by_method.items():
            methods[method] = {
                "bytes": arms[0]["bytes"], "bits_per_weight_body": arms[0]["bits_per_weight_body"],
                "torch": _ratio(arms, stock, "torch"), "llama": _ratio(arms, stock, "llama"),
                "seeds": [{"seed": row["seed"], "torch": _ratio([row], stock, "torch"),
                           "llama": _ratio([row], stock, "llama")} for row in arms]}
        entry = {"type": kind, "methods": methods}
        ours = {method: value["torch"]["ratio"] for method, value in methods.items() if is_ours(method)}
        if ours:
            best = min(ours, key=ours.get)
            entry["best"] = {"method": best, **{key: methods[best]["torch"][key]
                                                for key in ("kl", "ratio", "low", "high")}}
            if kind in BARS:
                entry["best"] |= {"bar": BARS[kind], "reached": ours[best] <= BARS[kind]}
        entries.append(entry)
    return entries


def shipping_rows(rows: dict[str, dict]) -> list[dict]:
    """All shipped files, smallest first; `pareto` when none is both no larger and better."""
    files = [{"type": row["type"], "method": row["method"], "seed": row["seed"], **shipped}
             for row in rows.values() for shipped in row.get("shipping", [])]
    files.sort(key=lambda file: (file["bytes"], file["kl"]))
    best = float("inf")
    for file in files:
        file["pareto"] = file["kl"] < best
        best = min(best, file["kl"])
    return files


def print_tables(rows: dict[str, dict], console: Console) -> None:
    """The comparison on equal embeddings, one table per type, then the shipped files."""
    for entry in summarise(rows):
        table = Table(title=f"{entry['type'].upper()}: KL to the float model, embedding and head F16")
        for name in ("arm", "seed", "KL", "± s.e.", "of stock", "95 %", "KL llama.cpp", "of stock", "95 %",
                     "top-1", "ppl", "body bpw"):
            table.add_column(name, justify="left" if name in ("arm", "seed") else "right")
        for method, value in entry["methods"].items():
            seeds = value["seeds"] if len(value["seeds"]) > 1 else []
            for one in seeds:
                table.add_row(method, str(one["seed"]), *_cells(one), "", style="dim")
            label = f"mean of {len(seeds)}" if seeds else ""
            table.add_row(method, label, *_cells(value), f"{value['bits_per_weight_body']:.3f}")
        console.print(table)
        if "best" in entry:
            console.print(_verdict(entry))
    files = shipping_rows(rows)
    if files:
        console.print(_shipping_table(files))


def _cells(value: dict) -> list[str]:
    weights, runtime = value["torch"], value["llama"]
    cells = [f"{weights['kl']:.4f}", f"{weights['kl_standard_error']:.4f}", f"{weights['ratio']:.3f}×",
             f"{weights['low']:.3f}-{weights['high']:.3f}"]
    cells += ([f"{runtime['kl']:.4f}", f"{runtime['ratio']:.3f}×",
               f"{runtime['low']:.3f}-{runtime['high']:.3f}"] if runtime else ["", "", ""])
    return [*cells, f"{100 * weights['top1']:.1f} %", f"{weights['ppl']:.2f}"]


def _verdict(entry: dict) -> str:
    best = entry["best"]
    text = (f"best of ours at {entry['type'].upper()}: {best['method']}, {best['ratio']:.3f}× stock "
            f"(95 % {best['low']:.3f}-{best['high']:.3f})")
    if "bar" in best:
        text += f"; bar {best['bar']}×: {'reached' if best['reached'] else 'NOT reached'}"
    return text + "\n"


def _shipping_table(files: list[dict]) -> Table:
    table = Table(title="Per file byte: real files, embedding and head quantised as shipped "
                        "(* = nothing smaller is better)")
    for name in ("arm", "embedding", "head", "MB", "bits per weight", "KL", "± s.e.", "KL × MB", ""):
        table.add_column(name, justify="left" if name in ("arm", "embedding", "head") else "right")
    for file in files:
        table.add_row(f"{file['type']} {file['method']}", file["embedding"], file["head"],
                      f"{file['bytes'] / 1e6:.1f}", f"{file['bits_per_weight']:.2f}", f"{file['kl']:.4f}",
                      f"{file['kl_standard_error']:.4f}", f"{file['kl'] * file['bytes'] / 1e6:.2f}",
                      "*" if file["pareto"] else "")
    return table
