"""Bars by way to round: the busiest rank, padding, and pairs that were moved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmoe.bench.routing_report import Result, varying
from distmoe.bench.routing_simulation import Outcome

PANELS: dict[str, Callable[[Outcome], float]] = {
    "tiles of the busiest rank / mean": lambda o: o.busiest_over_mean,
    "padding, % of the rows that run": lambda o: 100 * o.waste,
    "pairs moved, % of top-k": lambda o: 100 * (o.dropped + o.added),
}

# As many as have a colour of their own; more have shades of one scale.
MANY_SERIES = 10


def draw(results: list[Result], path: Path) -> None:
    """Write a picture in the format of the file's ending; a series of bars per setting."""
    from matplotlib.figure import Figure

    names = [outcome.name for outcome in results[0][1]]
    figure = Figure(figsize=(14 if len(results) <= MANY_SERIES else 20, 5), layout="constrained")
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
    from matplotlib import colormaps

    width = 0.8 / len(results)
    labels = varying([setting for setting, _ in results])
    colors = colormaps["tab10" if len(results) <= MANY_SERIES else "viridis"]
    for i, ((_, outcomes), label) in enumerate(zip(results, labels, strict=True)):
        shift = (i - (len(results) - 1) / 2) * width
        places = [place + shift for place in range(len(outcomes))]
        color = colors(i if len(results) <= MANY_SERIES else i / (len(results) - 1))
        heights = [value(outcome) for outcome in outcomes]
        panel.bar(places, heights, width, label=label or None, color=color)
