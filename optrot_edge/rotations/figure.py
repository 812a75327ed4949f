"""The figure of a rotation's report: learning curves, and every quantity per layer and matrix.

matplotlib is imported when a figure is drawn, and only its file backend (Agg): no display is needed.
"""

from __future__ import annotations

import logging
from pathlib import Path

from optrot_edge.quantize.sequential import LINEARS

# Okabe & Ito's palette: distinguishable with every common colour-vision deficiency. Dashes and hollow
# marks say the same once more, for print without colour, and rings round the dots where both are equal.
BEFORE = {"color": "#D55E00", "linestyle": "--", "marker": "o", "markersize": 6, "markerfacecolor": "none",
          "linewidth": 1.2, "zorder": 3}
AFTER = {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 3.5, "linewidth": 1.5}
GREY = "#555555"
# key in a row's `before` and `after`, label of the axis, its scale
QUANTITIES = (("mu_w", r"$\mu_W$", "log"), ("mu_h", r"$\mu_H$", "log"), ("mu_w_mu_h", r"$\mu_W\,\mu_H$", "log"),
              ("tr_d_over_tr_h", r"$\mathrm{tr}\,D\,/\,\mathrm{tr}\,H$", "linear"))
RATIO = "cost ratio\nafter / before"
LEGEND = r"$\mu_W = \max|W|\,\sqrt{mn}\,/\,\|W\|_F$ of the weights"
INPUT_LEGEND = (r";   $\mu_H = \max|Q|\,\sqrt{n}$, $Q$ the eigenvectors of the inputs' $H = E[xx^T]$;   "
                r"$H = (I+U)\,D\,(I+U)^T$" "\n"
                r"cost ratio of $\|W\|_F^2\;\mathrm{tr}\,D$: above 1 the rotation makes rounding on a given grid "
                "costlier, below 1 cheaper; a grid that fits the rotated weights better comes on top")


def draw(report: dict, path: Path) -> None:
    """Write the figure of `report` (see `optrot_edge.rotations.report.write_report`) to `path` as PNG.

    Raises ImportError without matplotlib, OSError when `path` cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # it tells of its cache on standard error
    quantities = [entry for entry in QUANTITIES if any(row["after"][entry[0]] is not None for row in report["layers"])]
    ratio = any(row["tr_d_ratio"] is not None for row in report["layers"])
    learned = bool(_learning(report["recipe"]))
    heights = [2.9] * learned + [1.95 * (len(quantities) + ratio) + 0.6]
    figure = Figure(figsize=(19, sum(heights) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(report), fontsize=15)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if learned:
        _draw_learning(parts[0], report["recipe"])
    _draw_matrices(parts[-1], report["layers"], quantities, ratio)
    figure.savefig(path, format="png", dpi=110)


def _title(report: dict) -> str:
    names = ", ".join(name.upper() for name in report["applied"])
    lines = [f"Rotation “{report['rotation']}” ({names}) of {report['model']}"]
    if report["calibration"]:
        about = report["calibration"]
        lines.append(f"inputs: {about['tokens']:,} tokens of {about['source']}; "
                     f"D with damping {report['damp']:g}, {'act-order' if report['act_order'] else 'stored order'}")
    return "\n".join([*lines, *report["notes"]])


def _learning(recipe: dict) -> list[str]:
    """Which panels of the learning row there is something for."""
    return [name for name in ("loss_curve", "layer_loss") if recipe.get(name)]


def _draw_learning(figure, recipe: dict) -> None:
    """The total loss over the steps; the loss per layer at the start and when learned."""
    from matplotlib.ticker import MaxNLocator

    panels = _learning(recipe)
    for name, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        if name == "loss_curve":
            axes.plot(recipe[name], **AFTER)
            axes.set_title("Learning curve, all layers")
            axes.set_xlabel("step")
        else:
            axes.plot(recipe["layer_loss_start"], **BEFORE, label="start of learning")
            axes.plot(recipe["layer_loss"], **AFTER, label="learned")
            axes.set_title("Loss per layer")
            axes.set_xlabel("layer")
            if min(recipe["layer_loss"]) > 0:
                axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("loss", fontsize=12)
        axes.grid(alpha=0.3)


def _draw_matrices(figure, rows: list[dict], quantities, ratio: bool) -> None:
    """A grid of panels: a row per quantity (one scale), a column per matrix, layers along x."""
    lines = len(quantities) + ratio
    grid = figure.subplots(lines, len(LINEARS), sharex=True, sharey="row", squeeze=False)
    for column, name in enumerate(LINEARS):
        of = sorted((row for row in rows if row["matrix"] == name), key=lambda row: row["layer"])
        layers = [row["layer"] for row in of]
        for axes, (key, _, _) in zip(grid[:, column], quantities, strict=False):
            before = axes.plot(layers, [row["before"][key] for row in of], **BEFORE)[0]
            after = axes.plot(layers, [row["after"][key] for row in of], **AFTER)[0]
        if ratio:
            axes = grid[-1, column]
            axes.axhline(1, color=GREY, linewidth=1.2)
            axes.plot(layers, [row["tr_d_ratio"] for row in of], color="black", marker="s", markersize=4, linewidth=1.2)
        grid[0, column].set_title(name, fontsize=13)
        grid[-1, column].set_xlabel("layer")
    styles = [(label, scale) for _, label, scale in quantities] + [(RATIO, "log")] * ratio
    for line, (label, scale) in zip(grid, styles, strict=True):
        line[0].set_ylabel(label, fontsize=12)
        for axes in line:
            dress(axes, scale)
    figure.legend([before, after], ["before: as stored", "after: rotated"], loc="outside upper right", ncols=2,
                  frameon=False, fontsize=12)
    figure.supxlabel(LEGEND + INPUT_LEGEND if ratio else LEGEND, fontsize=11)


def dress(axes, scale: str) -> None:
    """Scale, ticks that read as plain numbers and do not touch, whole layers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale(scale)
    if scale == "log":
        low, high = axes.get_ylim()
        between = (1.5, 2, 3, 5, 7) if high < 8 * low else (2, 3, 5) if high < 100 * low else ()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, *between)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(alpha=0.3)
