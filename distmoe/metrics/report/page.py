"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Sequence

from distmoe import __version__
from distmoe.metrics.report.pictures import pictures
from distmoe.metrics.report.run_files import Run
from distmoe.metrics.report.tables import Cells, sections

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem;
  padding: 0 1rem; color: #1c1c1c; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.05rem; margin: 0 0 .4rem; }
table { border-collapse: collapse; margin: 0 0 1.5rem; }
th, td { padding: .18rem .8rem .18rem 0; border-bottom: 1px solid #ddd; text-align: left;
  vertical-align: top; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(32rem, 1fr)); gap: 1.5rem; }
.grid td { white-space: nowrap; }
figure { margin: 0; } svg { max-width: 100%; height: auto; }
footer { color: #666; margin-top: 2rem; }
"""


def as_html(runs: Sequence[Run]) -> str:
    """Tables with the settings that differ on top, then pictures; no script, no link to a file."""
    names = ", ".join(html.escape(run.name) for run in runs)
    tables = sections(runs)
    figures = "".join(
        f"<figure><h2>{html.escape(title)}</h2>{svg}</figure>\n"
        for title, svg in pictures(runs).items()
    )
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n'
        f"<title>{names}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{names}</h1>\n"
        + _first(runs, tables)
        + f'<div class="grid">\n{figures}</div>\n<h1>Figures</h1>\n<div class="grid">\n'
        + "".join(_table(runs, title, lines) for title, lines in tables.items())
        + "</div>\n"
        + _settings(runs)
        + f"<footer>distmoe {__version__}</footer>\n</body>\n</html>\n"
    )


def _first(runs: Sequence[Run], tables: dict[str, Cells]) -> str:
    """What differs goes above the pictures, and is not told again below them."""
    title, lines = next(iter(tables.items()))
    if title != "settings that differ":
        return ""
    del tables[title]
    return _table(runs, title, lines)


def _settings(runs: Sequence[Run]) -> str:
    """All of them, folded away."""
    keys = sorted({key for run in runs for key in run.config})
    lines = [(key, [str(run.config.get(key, "-")) for run in runs]) for key in keys]
    table = _table(runs, "setting", lines)
    return f"<details><summary>All settings</summary>\n{table}</details>\n"


def _table(runs: Sequence[Run], title: str, lines: Cells) -> str:
    head = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>\n"
        for label, cells in lines
    )
    # The outer element fills its place in a grid, the table is as wide as its cells.
    return f"<div><table>\n<tr><th>{html.escape(title)}</th>{head}</tr>\n{body}</table></div>\n"
