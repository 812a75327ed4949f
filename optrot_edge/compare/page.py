"""A comparison as one HTML page: tables and figures inside, light and dark, no scripts and nothing from outside."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

from optrot_edge.compare.tables import about, columns, tables

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #767676; --head: #eef1f4; --link: #0b57a4 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --line: #8a8f96; --head: #262b31; --link: #8ab8f0 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 75rem; padding: 1rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.25; text-wrap: balance }
a { color: var(--link) }
.scroll { overflow-x: auto }
section { margin: 0 0 1.75rem }
ul { margin: .5rem 0 0; padding-left: 1.2rem }
.scroll:focus-visible, a:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
h3 { font-size: 1rem; margin: 0 0 .4rem }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right; white-space: nowrap }
thead th { background: var(--head) }
th:first-child { text-align: left }
tbody th { font-weight: 500 }
.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; width: 70% }
tr.best td, tr.best th { font-weight: 700 }
figure { margin: 0 0 2rem }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line) }
figcaption { padding-top: .4rem }
"""


def page(results: dict, pictures: list[tuple[Path, str]]) -> str:
    """The page's HTML; `pictures` are PNG files with their captions."""
    title = f"{escape(results['model'])}: rotations compared"
    parts = ["<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8"/>',
             '<meta name="viewport" content="width=device-width, initial-scale=1"/>', f"<title>{title}</title>",
             f"<style>{STYLE}</style>", "</head>", "<body>", "<main>", f"<h1>{title}</h1>",
             *(f"<p>{escape(line)}</p>" for line in about(results)),
             '<nav aria-label="On this page"><a href="#tables">Tables</a> · <a href="#figures">Figures</a> · '
             '<a href="#settings">Settings</a></nav>', '<h2 id="tables">Tables</h2>',
             "<p>In bold the smallest KL of a table.</p>"]
    parts += [_table(f"table-{number}", table, columns(results)) for number, table in enumerate(tables(results), 1)]
    parts.append('<h2 id="figures">Figures</h2>')
    parts += [_picture(path, caption) for path, caption in pictures]
    parts += ['<h2 id="settings">Settings</h2>', _settings(results), "</main>", "</body>", "</html>"]
    return "\n".join(parts) + "\n"


def _table(name: str, table: dict, headings: tuple[str, ...]) -> str:
    measured = [row["kl_mean"] for row in table["rows"] if row.get("kl_mean") is not None]
    lines = []
    for row, (first, *rest) in zip(table["rows"], table["cells"], strict=True):
        best = ' class="best"' if measured and row.get("kl_mean") == min(measured) else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr{best}><th scope="row">{escape(first)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in headings)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table["notes"])
    after = f"<ul>{notes}</ul>" if notes else ""
    return _section(name, table["title"], f"<thead><tr>{head}</tr></thead>", lines, after)


def _section(name: str, title: str, head: str, lines: list[str], after: str = "", kind: str = "measured") -> str:
    """A table that scrolls by itself when it is wider than the page."""
    body = "\n".join(lines)
    return (f'<section><h3 id="{name}">{escape(title)}</h3>'
            f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0">'
            f'<table class="{kind}" aria-labelledby="{name}">{head}<tbody>\n{body}\n</tbody></table></div>'
            f"{after}</section>")


def _picture(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    text = escape(caption)
    return (f'<figure><img src="data:image/png;base64,{data}" alt="{text}"/>'
            f"<figcaption>{text}</figcaption></figure>")


def _settings(results: dict) -> str:
    settings = results["settings"]
    entries = {**settings["recipe"], **settings["versions"], **settings["processor"],
               **{f"SHA-256 of {name}": digest for name, digest in settings["files"].items()}}
    lines = [f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
             for name, value in entries.items() if value not in (None, [])]
    return _section("shared", "What all rows share", "", lines, kind="settings")
