"""The pictures of a report, as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distmoe.metrics.heat_map import heat_map
from distmoe.metrics.report.figures import PARTS, seconds_by_part
from distmoe.metrics.report.run_files import Run

# Points of a curve; a longer run is drawn by means of neighbours.
MOST_POINTS = 1000

SIZE = (7.2, 3.6)
# Any: its own type spells out every key of matplotlib.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def pictures(runs: Sequence[Run]) -> dict[str, str]:
    """SVG by title."""
    draw: dict[str, Callable[[Axes], None]] = {
        "Loss": partial(_loss, runs=runs),
        "Throughput": partial(_throughput, runs=runs),
        "Time": partial(_time, runs=runs),
        "Exposed communication": partial(_exposed, runs=runs),
    }
    for run in runs:
        if run.loads:
            draw[f"Expert load of {run.name}, step {run.loads_step}"] = partial(_loads, run=run)
    return {title: _svg(title, draw_on) for title, draw_on in draw.items()}


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    """The SVG element alone, as it stands inside a page."""
    # Pictures of one page must not share the names that they use inside.
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points, each the mean of neighbours; a None is no point."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if b is not None]
    every = max(math.ceil(len(points) / MOST_POINTS), 1)
    means = [
        np.mean(points[start : start + every], axis=0) for start in range(0, len(points), every)
    ]
    return [float(mean[0]) for mean in means], [float(mean[1]) for mean in means]


def _curve(axes: Axes, lines: Sequence[dict[str, Any]], name: str, **look: Any) -> Any:
    """Draw a figure over the steps; the colour that it has."""
    x, y = thinned([line["step"] for line in lines], [line[name] for line in lines])
    (curve,) = axes.plot(x, y, **look)
    return curve.get_color()


def _loss(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        color = _curve(axes, run.steps, "loss", label=run.name, linewidth=1)
        look = {"color": color, "marker": "o", "linestyle": "--", "markersize": 3}
        _curve(axes, run.validations, "validation_loss", label=f"{run.name}, validation", **look)
    axes.set(xlabel="step", ylabel="nats per token")
    axes.legend()


def _throughput(axes: Axes, runs: Sequence[Run]) -> None:
    name = "tokens_per_second_per_rank"
    for run in runs:
        measured = [line for line in run.steps if not line["warm_up"]] or run.steps
        warm = [line for line in run.steps if line["warm_up"]]
        color = _curve(axes, measured, name, label=run.name, linewidth=1)
        _curve(axes, warm, name, color=color, marker="x", linestyle="none", markersize=4)
        axes.axhline(run.figures.medians[name], color=color, linestyle=":", linewidth=1)
    axes.set(xlabel="step (x: warm-up, not measured; dotted: median)", ylabel="tokens/s/rank")
    axes.set_ylim(bottom=0)
    axes.legend()


def _time(axes: Axes, runs: Sequence[Run]) -> None:
    parts = [seconds_by_part(run) for run in runs]
    wholes = [max(sum(of_run.values()), 1e-9) for of_run in parts]
    left = np.zeros(len(runs))
    rows = range(len(runs))
    for part in PARTS:
        share = np.array([100 * p[part] / w for p, w in zip(parts, wholes, strict=True)])
        axes.barh(rows, share, left=left, label=part, height=0.6)
        left += share
    axes.set_yticks(rows, [run.name for run in runs])
    axes.invert_yaxis()
    axes.set(xlabel="% of the time of all steps, validations and checkpoints", xlim=(0, 100))
    axes.legend(ncols=len(PARTS), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7)


def _exposed(axes: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        shares = [{**line, "percent": 100 * line["exposed_share"]} for line in run.steps]
        _curve(axes, shares, "percent", label=run.name, linewidth=1)
    axes.set(xlabel="step", ylabel="% of the step")
    axes.set_ylim(bottom=0)
    axes.legend()


def _loads(axes: Axes, run: Run) -> None:
    pairs_LE = np.array(list(run.loads.values()), dtype=np.int64)
    axes.imshow(heat_map(pairs_LE, cell=1), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(run.loads)), [str(layer) for layer in run.loads])
    axes.set(
        xlabel="expert (white: mean of the layer, red: more, blue: less, black: none)",
        ylabel="layer",
    )
    axes.grid(visible=False)
