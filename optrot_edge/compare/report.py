"""Writing what a comparison found: Markdown, CSV, figures, and a page that holds all of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from optrot_edge.compare.figures import figures
from optrot_edge.compare.page import page
from optrot_edge.compare.tables import as_csv, markdown
from optrot_edge.errors import StorageError
from optrot_edge.journal import commit


def write_reports(out: Path, results: dict) -> None:
    """Write `results.md`, `results.csv`, `figures/*.png` and `index.html` into the folder `out`, each under a temporary
    name first. Raises StorageError when one cannot be written."""
    folder, drawn = out / "figures", []
    try:
        shutil.rmtree(folder, ignore_errors=True)  # of another run, which may have had others
        folder.mkdir()
        for figure in figures(results):
            commit(folder / figure.name, figure.draw)
            drawn.append((folder / figure.name, figure.caption))
        for name, text in (("results.md", markdown(results)), ("results.csv", as_csv(results)),
                           ("index.html", page(results, drawn))):
            commit(out / name, _writer(text))
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from None


def _writer(text: str) -> Callable[[Path], object]:
    return lambda partial: partial.write_text(text, encoding="utf-8")
