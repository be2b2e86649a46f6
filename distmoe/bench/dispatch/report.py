"""What the dispatch bench shows: a table of times, one of bytes, two of exposed communication, and
a picture of the times."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from distmoe.bench.dispatch.exposed import Exposed
from distmoe.bench.dispatch.measure import Timing
from distmoe.bench.dispatch.ways import Way
from distmoe.bench.tool import console_of, table_of

MIB = 2**20


@dataclass(frozen=True)
class Line:
    """One subject: the slowest rank of every round, and the model's seconds, None for a peer.

    Bytes of rows that cross between nodes in one forward and backward, those of the mean rank:
    ``counted`` by the exchange, ``routing`` pair by pair from the routing, ``formula`` of uniform
    routing, ``interface`` what the hosts' network interfaces sent. ``worst_rank``: the largest
    |counted / routing - 1| of a rank.
    """

    timing: Timing
    predicted_s: float | None
    counted: float
    routing: float | None
    formula: float | None
    interface: float | None
    worst_rank: float | None


@dataclass(frozen=True)
class ExposedLine:
    """Means over the ranks, of the fastest round, which other work of the machine disturbed least:
    seconds of forward and backward, seconds that our accounting calls exposed, and wall time less
    that of the fastest pass with free transfers."""

    name: str
    level: str
    overlap: bool
    wall_s: float
    accounted_s: float
    by_clock_s: float

    @staticmethod
    def of(way: Way, ranks: Sequence[Exposed]) -> ExposedLine:
        def means(figures: Sequence[Sequence[float]]) -> list[float]:
            return [statistics.fmean(of_round) for of_round in zip(*figures, strict=True)]

        rounds = zip(
            means([rank.wall_s for rank in ranks]),
            means([rank.accounted_s for rank in ranks]),
            strict=True,
        )
        wall_s, accounted_s = min(rounds)
        free_s = min(means([rank.free_s for rank in ranks]))
        return ExposedLine(way.name, way.level, way.overlap, wall_s, accounted_s, wall_s - free_s)


def times_table(title: str, lines: Sequence[Line]) -> Table:
    """Of forward and backward together."""
    figures = ("median ms", "min", "max", "of the first", "predicted ms", "error")
    table = table_of(f"{title}: forward and backward of the experts", "way", figures)
    first = statistics.median(lines[0].timing.total_s)
    for line in lines:
        total = line.timing.total_s
        median = statistics.median(total)
        predicted = ["", ""]
        if line.predicted_s is not None:
            predicted = [f"{1000 * line.predicted_s:.1f}", f"{line.predicted_s / median - 1:+.0%}"]
        table.add_row(
            line.timing.name,
            f"{1000 * median:.1f}",
            f"{1000 * min(total):.1f}",
            f"{1000 * max(total):.1f}",
            f"{median / first:.2f}",
            *predicted,
        )
    return table


def bytes_table(lines: Sequence[Line]) -> Table:
    """Of rows between nodes."""
    title = "MiB that the mean rank sends between nodes, forward and backward"
    figures = ("exchange", "by its routing", "worst rank", "uniform routing", "off", "interface")
    table = table_of(title, "way", (*figures, "above the exchange"))
    for line in lines:
        table.add_row(
            line.timing.name,
            f"{line.counted / MIB:.3f}",
            *_against(line.routing, line.worst_rank),
            *_against(line.formula, line.formula and line.counted / line.formula - 1),
            *_against(line.interface, line.interface and line.interface / line.counted - 1),
        )
    return table


def _against(num_bytes: float | None, off: float | None) -> list[str]:
    if num_bytes is None or off is None:
        return ["", ""]
    return [f"{num_bytes / MIB:.3f}", f"{off:+.2%}"]


def exposed_table(lines: Sequence[ExposedLine]) -> Table:
    """By the accounting and by the clock."""
    figures = ("wall ms", "accounted ms", "share", "by the clock ms", "share", "ratio")
    table = table_of("exposed communication of forward and backward", "way", figures)
    for line in lines:
        table.add_row(
            line.name,
            f"{1000 * line.wall_s:.1f}",
            f"{1000 * line.accounted_s:.1f}",
            f"{line.accounted_s / line.wall_s:.1%}",
            f"{1000 * line.by_clock_s:.1f}",
            f"{line.by_clock_s / line.wall_s:.1%}",
            f"{line.accounted_s / line.by_clock_s:.2f}",
        )
    return table


def hidden_table(lines: Sequence[ExposedLine]) -> Table:
    """What overlap saves against the waiting way of the same level: of the wall time, and of the
    communication that the accounting calls exposed."""
    figures = ("wall ms saved", "accounted ms saved", "ratio")
    table = table_of("communication that overlap hides, against waiting", "way", figures)
    waiting = {line.level: line for line in lines if not line.overlap}
    for line in lines:
        if line.overlap:
            wall_s = waiting[line.level].wall_s - line.wall_s
            accounted_s = waiting[line.level].accounted_s - line.accounted_s
            table.add_row(
                line.name,
                f"{1000 * wall_s:.1f}",
                f"{1000 * accounted_s:.1f}",
                f"{accounted_s / wall_s:.2f}",
            )
    return table


def show(*tables: Table, notes: Sequence[str] = ()) -> None:
    console = console_of(130)
    for table in tables:
        console.print(table)
    for note in notes:
        console.print(note)


def draw(lines: Sequence[Line], path: Path) -> None:
    """Medians with the range of the rounds, and the prediction as a line on each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    totals = [[1000 * value for value in line.timing.total_s] for line in lines]
    medians = [statistics.median(total) for total in totals]
    below = [median - min(total) for median, total in zip(medians, totals, strict=True)]
    above = [max(total) - median for median, total in zip(medians, totals, strict=True)]
    figure, axis = pyplot.subplots(figsize=(9, 0.4 * len(lines) + 1.2), constrained_layout=True)
    places = list(range(len(lines)))
    colors = ["tab:blue" if line.predicted_s is not None else "tab:orange" for line in lines]
    axis.barh(
        places, medians, xerr=[below, above], capsize=3, color=colors,
        label="measured, with its range (orange: peers)",
    )  # fmt: skip
    predicted = [(i, line.predicted_s) for i, line in enumerate(lines) if line.predicted_s]
    axis.scatter(
        [1000 * seconds for _, seconds in predicted], [place for place, _ in predicted],
        marker="|", s=200, color="black", label="predicted",
    )  # fmt: skip
    axis.set_yticks(places, [line.timing.name for line in lines])
    axis.invert_yaxis()
    axis.set_xlabel("forward and backward of the experts, ms")
    axis.legend()
    figure.savefig(path, dpi=110)
