"""Bars by way to round: the busiest rank, padding, and pairs that were moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmoe.planner.routing_report import Result, varying
from distmoe.planner.routing_simulation import Outcome

PANELS: dict[str, Callable[[Outcome], float]] = {
    "tiles of the busiest rank / mean": lambda o: o.busiest_over_mean,
    "padding, % of the rows that run": lambda o: 100 * o.waste,
    "pairs moved, % of top-k": lambda o: 100 * (o.dropped + o.added),
}


def draw(results: list[Result], path: Path) -> None:
    """Write a picture in the format of the file's ending; a series of bars per setting."""
    from matplotlib.figure import Figure

    names = [outcome.name for outcome in results[0][1]]
    width = max(14.0, 0.12 * len(results) * len(names) * len(PANELS))
    figure = Figure(figsize=(width, 4.4), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for panel, (title, value) in zip(panels, PANELS.items(), strict=True):
        _draw_panel(panel, results, value)
        panel.set_title(title, fontsize="medium")
        panel.set_xticks(range(len(names)), names, rotation=35, ha="right")
        panel.grid(axis="y", linewidth=0.3)
        panel.set_axisbelow(True)
    panels[0].set_ylim(bottom=0.9)
    panels[0].axhline(1, color="black", linewidth=0.8)
    if len(results) > 1:
        labelled = panels[0].get_legend_handles_labels()
        figure.legend(*labelled, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=110)


def _draw_panel(panel: Any, results: list[Result], value: Callable[[Outcome], float]) -> None:
    width = 0.8 / len(results)
    labels = varying([setting for setting, _ in results])
    for i, ((_, outcomes), label) in enumerate(zip(results, labels, strict=True)):
        shift = (i - (len(results) - 1) / 2) * width
        places = [place + shift for place in range(len(outcomes))]
        panel.bar(places, [value(outcome) for outcome in outcomes], width, label=label or None)
