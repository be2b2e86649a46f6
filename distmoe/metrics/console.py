"""What rank 0 prints: a header, a line every n steps, a summary. Plain lines without a terminal."""

from __future__ import annotations

from typing import IO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distmoe.metrics.layer_table import layer_table
from distmoe.metrics.record import StepRecord
from distmoe.metrics.standard_output import StandardOutput

# Step lines between two lines of column names.
HEADING_EVERY = 20

LEGEND = (
    "slowest: own time of the slowest rank over the mean; load: busiest expert over the mean;\n"
    "tiles: busiest rank over the mean; waste: padding among the rows that ran (if not rounded);\n"
    "moved: pairs that rounding dropped or added, of those that top-k chose (and their scores)"
)


class RunConsole:
    """``enabled`` False (all ranks but the first) prints nothing. ``steps``: of the run."""

    def __init__(self, *, enabled: bool, steps: int) -> None:
        self._output = StandardOutput()
        self.console = Console(
            file=cast(IO[str], self._output),
            quiet=not enabled,
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        self.steps = steps
        self._step_lines = 0
        self._warned: set[str] = set()
        self._progress: Progress | None = None

    def begin(self, first_step: int) -> None:
        """Show the bar, on a terminal; ``first_step`` is done."""
        if self.console.quiet or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            # The default of 30 s gives no estimate where a step takes longer.
            speed_estimate_period=600,
        )
        self._task = self._progress.add_task("training", total=self.steps, completed=first_step)
        self._progress.start()

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns, name and value."""
        self.console.print(title, style="bold")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.console.print(f"  {name:<{width}}  {value}")

    def step(self, record: StepRecord) -> None:
        """The line of one step, under column names that come again now and then."""
        cells = _cells(record, self.steps)
        if self._step_lines == 0:
            self.console.print(LEGEND, style="dim")
        if self._step_lines % HEADING_EVERY == 0:
            names = (f"{name:>{width}}" for name, width, _ in cells)
            self.console.print("  ".join(names), style="bold")
        self._step_lines += 1
        line = "  ".join(f"{value:>{width}}" for _, width, value in cells)
        self.console.print(line)

    def layers(self, record: StepRecord, *, most: int | None = None) -> None:
        """A table of the step's MoE layers; ``most``: only the worst ones by tiles."""
        title, *lines = layer_table(record, most=most)
        self.console.print(title, style="bold")
        for line in lines:
            self.console.print(line)

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        self.console.print(text)

    def warn_once(self, key: str, text: str) -> None:
        """A warning, the first time only that ``key`` is warned of."""
        if key not in self._warned:
            self._warned.add(key)
            self.console.print(f"warning: {text}", style="yellow")

    def close(self) -> None:
        """Take the bar away; again is harmless."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def end(self) -> None:
        """Nothing more is printed; again is harmless."""
        self.close()
        self._output.end()


def _cells(record: StepRecord, steps: int) -> list[tuple[str, int, str]]:
    """Name, width and text of every column; within 120 characters up to 99,999 steps."""
    load, forced = record.load, record.routing == "forced"
    learned, slowest = record.learned, record.slowest
    return [
        ("step", max(9, 2 * len(str(steps)) + 1), f"{record.step}/{steps}"),
        ("loss", 7, f"{learned.loss:.4f}"),
        ("lr", 8, f"{learned.lr:.2e}"),
        # A step is skipped for a norm that is not finite, so nothing is hidden.
        ("grad", 7, "SKIPPED" if learned.skipped else f"{learned.grad_norm:.3f}"),
        ("tok/s/rank", 10, f"{record.speed.tokens_per_second_per_rank:,.0f}"),
        # Nobody timed it.
        (
            "slowest",
            7,
            "-" if slowest.slowest_rank is None else f"{slowest.slowest_over_mean:.2f}x",
        ),
        # A load that the router did not choose is no figure of training.
        ("load", 6, "forced" if forced else f"{load.load_max_over_mean:.2f}x"),
        ("tiles", 6, f"{load.tiles_max_over_mean:.2f}x"),
        ("waste", 13, f"{load.tile_waste:.1%} ({load.tile_waste_unrounded:.1%})"),
        ("moved", 13, f"{load.pairs_moved_share:.1%} ({load.score_moved_share:.1%})"),
        ("memory", 10, f"{record.memory_gib:.2f} GiB"),
    ]
