"""The figures of a comparison: quantities and SNR per layer and matrix, KL bars, learning curves.

matplotlib is imported when a figure is drawn, and only its file backend (Agg): no display is needed.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optrot_edge.compare.arms import ARMS
from optrot_edge.compare.tables import kl_digits, tables
from optrot_edge.quantize.sequential import LINEARS
from optrot_edge.rotations.figure import dress

# Okabe & Ito's palette without its yellow, and darker shades: an arm has its colour and its mark in every figure.
STYLES = (("#000000", "o"), ("#D55E00", "s"), ("#0072B2", "^"), ("#56B4E9", "v"), ("#009E73", "D"), ("#CC79A7", "P"),
          ("#E69F00", "X"), ("#7F3C8D", "*"), ("#8C6D1F", "<"), ("#666666", ">"),
          ("#A50026", "h"), ("#1B7837", "p"), ("#3F3FBF", "d"))
MU_W, MU_H = r"$\mu_W$", r"$\mu_H$"
# Label of the axis, its scale, title, and the definition that the caption adds.
QUANTITIES = {
    "mu_w": (MU_W, "log", "Incoherence of the weights", "μ_W = max|W| √(mn) / ‖W‖_F"),
    "mu_h": (MU_H, "log", "Incoherence of the inputs", "μ_H = max|Q| √n, Q the eigenvectors of H = E[xxᵀ]"),
    "mu_w_mu_h": (r"$\mu_W\,\mu_H$", "log", "Product of both incoherences", "μ_W μ_H"),
    "tr_d_over_tr_h": (r"$\mathrm{tr}\,D\,/\,\mathrm{tr}\,H$", "linear", "What GPTQ's feedback leaves of the loss",
                       "tr D / tr H with H = (I+U) D (I+U)ᵀ, U strictly upper triangular")}


@dataclass
class FigureFile:
    """A figure: its file's name, what it shows, and `build()`, which returns matplotlib's Figure."""

    name: str
    caption: str
    build: Callable

    def draw(self, path: Path) -> None:
        """Write it as PNG."""
        self.build().savefig(path, format="png", dpi=110, metadata={"Software": None})


def figures(results: dict) -> list[FigureFile]:
    """Every figure that `results` have something for."""
    found = []
    if any(row["status"] == "measured" for row in results["rows"]):
        found.append(FigureFile("kl.png", "KL divergence from the float model in nats: mean, and one standard error as "
                                          "whiskers. Each panel has its own scale; a hatched bar was not reproduced.",
                                lambda: _draw_kl(results)))
    for online in (False, True):
        arms = _arms(results, online)
        if not any(entry["online"] == online for entry in arms.values()):
            continue
        where = "with online R3 and R4" if online else "without online rotations"
        lines = {name: (entry["arm"], _dashes(entry), entry["layers"]) for name, entry in arms.items()}
        for key, (label, scale, what, definition) in QUANTITIES.items():
            if all(row[key] is None for entry in arms.values() for row in entry["layers"]):
                continue
            draw = functools.partial(_draw_layers, lines, key, label, scale, f"{what}, {where}")
            found.append(FigureFile(f"{key.replace('_', '-')}{'-online' if online else ''}.png",
                                    f"{what}, {where}, per layer and matrix: {definition}.", draw))
    found += _snr_figures(results)
    if results["curves"]:
        found.append(FigureFile("learning.png", "Loss of what was learned, over the steps; every arm has its own loss.",
                                lambda: _draw_curves(results)))
    return found


def _snr_figures(results: dict) -> list[FigureFile]:
    """SNR of every layer, a figure per table of quantised models; with rounding to nearest one beside its bound too."""
    found = {}
    for table in tables(results):
        rows = {row["label"]: row for row in table["rows"] if row["build"] in results["errors"]}
        if not rows:
            continue
        lines = {label: (row["arm"], "-", results["errors"][row["build"]]) for label, row in rows.items()}
        last = table["rows"][-1]
        where = f"w{last['bits']}-{last['quantizer']}{'-online' if table['online'] else ''}.png"
        what = f"SNR of the layers' outputs: {table['title'].replace('A8', '').replace('A4', '')}"
        draw = functools.partial(_draw_layers, lines, "snr_db", "SNR (dB)", "linear")
        found[f"snr-{where}"] = FigureFile(f"snr-{where}", f"{what}. In dB, higher is better.",
                                           functools.partial(draw, what))
        if last["quantizer"] == "rtn" and any(row["bound_db"] is not None for _, _, of in lines.values() for row in of):
            found[f"bound-{where}"] = FigureFile(
                f"bound-{where}", f"{what}. Dotted: the least that the bound on rounding to nearest, μ_W² λ_max(H) "
                "‖W‖_F² / (2^b − 1)², leaves it.",
                functools.partial(draw, f"{what}\ndotted: the bound", below="bound_db"))
    return list(found.values())


def _arms(results: dict, online: bool) -> dict[str, dict]:
    """Quantities by legend, those of the unrotated model with either."""
    return {ARMS[entry["arm"]].legend(entry["bits"]): entry for entry in results["quantities"].values()
            if entry["online"] == online or entry["arm"] == "none"}


def _dashes(entry: dict) -> str:
    """An arm learned for each width of the weights has several lines of one colour."""
    return {None: "-", 2: ":", 3: "--", 4: "-", 5: "-."}.get(entry["bits"], (0, (entry["bits"] or 1, 2)))


def _style(arm: str) -> dict:
    colour, marker = STYLES[list(ARMS).index(arm) % len(STYLES)]
    return {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "markerfacecolor": "none"}


def _figure(width: float, height: float, title: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of its cache on standard error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=14)
    return figure


def _draw_layers(lines: dict, key: str, label: str, scale: str, title: str, *, below: str | None = None):
    """A panel per matrix, layers along x, a line per arm; `below` names a second value, drawn dotted."""
    figure = _figure(15, 7.5, title)
    grid = figure.subplots(2, 4, sharex=True, sharey=True)
    panels, handles = list(grid.flat), {}
    for axes, matrix in zip(panels, LINEARS, strict=False):
        for name, (arm, dashes, rows) in lines.items():
            of = sorted((row for row in rows if row["matrix"] == matrix), key=lambda row: row["layer"])
            layers = [row["layer"] for row in of]
            values = [math.nan if row[key] is None else row[key] for row in of]
            handles[name] = axes.plot(layers, values, linestyle=dashes, **_style(arm))[0]
            if below:
                bounds = [math.nan if row[below] is None else row[below] for row in of]
                axes.plot(layers, bounds, linestyle=":", linewidth=1.2, color=_style(arm)["color"])
        axes.set_title(matrix, fontsize=12)
    for axes in panels[:len(LINEARS)]:
        dress(axes, scale)
        axes.tick_params(labelleft=True)
    for axes in (*grid[1, :3], grid[0, 3]):
        axes.set_xlabel("layer")
        axes.tick_params(labelbottom=True)
    for axes in grid[:, 0]:
        axes.set_ylabel(label, fontsize=12)
    panels[-1].axis("off")
    legend = panels[-1].legend(list(handles.values()), list(handles), loc="center", frameon=False,
                               fontsize=min(12, 12 * 13 / len(handles)))
    legend.set_in_layout(False)  # as large as it is, it takes no room from the panels
    return figure


def _draw_kl(results: dict):
    """Bars of KL, a panel per table of which a row was measured."""
    tabled = [table for table in tables(results) if table["rows"]]
    shown = [table for table in tabled if any(row["status"] == "measured" for row in table["rows"])] or tabled
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    tallest = max(len(table["rows"]) for table in shown)
    same = len({tuple(row["label"] for row in table["rows"]) for table in shown}) == 1
    figure = _figure((5.2 if same else 6.2) * columns + 2, lines * (1.5 + 0.36 * tallest) + 0.6,
                     f"{results['model']}: KL divergence from the float model")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(shown):]:
        axes.axis("off")
    for axes, table in zip(grid.flat, shown, strict=False):
        _bars(axes, table)
        axes.tick_params(labelleft=axes in grid[:, 0] or not same)
    return figure


def _bars(axes, table: dict) -> None:
    from matplotlib.ticker import MaxNLocator

    rows = table["rows"]
    for place, row in enumerate(rows):
        value = row.get("kl_mean") if row["status"] == "measured" else None
        if value is None:
            axes.text(0, place, f" {'not finite' if row['status'] == 'measured' else row['status']}", va="center",
                      color="#555555", style="italic", fontsize=10)
            continue
        error = row["kl_se"] or 0.0
        axes.barh(place, value, xerr=error, color=_style(row["arm"])["color"], alpha=0.75, height=0.7,
                  hatch="//" if row["not_reproduced"] else None, edgecolor="white",
                  error_kw={"ecolor": "black", "elinewidth": 1.3, "capsize": 3})
        axes.annotate(f"{value:.{kl_digits(value)}f}", (value + error, place), xytext=(4, 0),
                      textcoords="offset points", va="center", fontsize=9)
    short, _, rest = table["title"].partition(", groups of")
    grid, _, online = rest.rpartition(", ")
    axes.set_title(f"{short}, {online}\ngroups of{grid}", fontsize=10)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=10)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    ends = [row["kl_mean"] + (row["kl_se"] or 0) for row in rows if row.get("kl_mean") is not None]
    axes.set_xlim(0, 1.22 * max(ends, default=1.0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("KL (nats)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_curves(results: dict):
    """A panel per learned rotation: losses of different methods have different units."""
    from matplotlib.ticker import MaxNLocator

    shown = results["curves"]
    columns = min(3, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = _figure(5 * columns + 1, 3 * lines + 0.7, "Loss while learning")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat[len(shown):]:
        axes.axis("off")
    for axes, (name, curve) in zip(grid.flat, shown.items(), strict=False):
        row = next(row for row in results["rows"] if row["rotation"] == name)
        arm = ARMS[row["arm"]]
        online = ", R3 and R4" if name.endswith("-online") else ""
        axes.plot(range(len(curve)), curve, color=_style(arm.name)["color"], linewidth=1.5,
                  marker="o" if len(curve) < 30 else None, markersize=3.5)
        axes.set_title(arm.legend(row["bits"] if arm.per_grid else None) + online, fontsize=12)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    return figure
