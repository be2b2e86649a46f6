"""A report as text: for the terminal, as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from distmoe.metrics.report.figures import SECTIONS, flat_figures
from distmoe.metrics.report.run_files import Run, differing

Cells = list[tuple[str, list[str]]]


def sections(runs: Sequence[Run]) -> dict[str, Cells]:
    """Lines of cells by section, a cell for each run; first of all the settings that differ."""
    flats = [flat_figures(run) for run in runs]
    settings = [(key, list(map(_setting, values))) for key, values in differing(runs).items()]
    figures = {
        title: [(row.label, [row.show(flat) for flat in flats]) for row in rows]
        for title, rows in SECTIONS.items()
    }
    return {"settings that differ": settings, **figures} if settings else figures


def _setting(value: object) -> str:
    return "-" if value is None else str(value)


def print_report(runs: Sequence[Run], console: Console) -> None:
    """One table, a column for each run."""
    table = Table(show_header=True, header_style="bold")
    table.add_column("")
    for run in runs:
        table.add_column(run.name, justify="right", overflow="fold")
    for title, lines in sections(runs).items():
        table.add_section()
        table.add_row(title, style="bold")
        for label, cells in lines:
            table.add_row(f"  {label}", *cells)
    console.print(table, markup=False)


def as_markdown(runs: Sequence[Run]) -> str:
    """A table for each section."""
    parts = []
    for title, lines in sections(runs).items():
        head = [title, *(run.name for run in runs)]
        body = [[label, *cells] for label, cells in lines]
        rows = [head, ["---", *["---:"] * len(runs)], *body]
        parts.append("".join("| " + " | ".join(map(_escaped, row)) + " |\n" for row in rows))
    return "\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def as_csv(runs: Sequence[Run]) -> str:
    """A line for each run, a column for each figure, numbers in full."""
    flats = [{"run": run.name, **flat_figures(run)} for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flats[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flats)
    return text.getvalue()


def as_json(runs: Sequence[Run]) -> str:
    """Figures and settings of every run, and the settings that differ, as lists in their order."""
    of_runs = [
        {"run": run.name, "figures": flat_figures(run), "config": run.config} for run in runs
    ]
    return json.dumps({"runs": of_runs, "differing": differing(runs)}, indent=1) + "\n"
