"""What rank 0 prints: a header, a line every n steps, a summary. Plain lines without a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distmoe.metrics.record import StepRecord


class RunConsole:
    """``enabled`` False (all ranks but the first) prints nothing."""

    def __init__(self, *, enabled: bool, steps: int, first_step: int) -> None:
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self.steps = steps
        self._warned: set[str] = set()
        self._progress: Progress | None = None
        if enabled and self.console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("training", total=steps, completed=first_step)
            self._progress.start()

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns, name and value."""
        self.console.print(title, style="bold")
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.console.print(f"  {name:<{width}}  {value}", markup=False)

    def step(self, record: StepRecord) -> None:
        """The line of one step."""
        load = record.load
        moved = 100 * (record.pairs_dropped + record.pairs_added) / max(record.pairs, 1)
        self.console.print(
            f"step {record.step:>{len(str(self.steps))}}/{self.steps}"
            f"  loss {record.loss:.4f}  lr {record.lr:.2e}  grad {record.grad_norm:.3f}"
            f"  {record.tokens_per_second_per_rank:,.0f} tok/s/rank"
            f"  slowest {record.slowest_over_mean:.2f}x"
            f"  load {load.load_max_over_mean:.2f}x  tiles {load.tiles_max_over_mean:.2f}x"
            f"  waste {load.tile_waste:.1%} (unrounded {load.tile_waste_unrounded:.1%})"
            f"  moved {moved:.1f}%  mem {record.memory_gib:.2f} GiB"
            + ("  SKIPPED: not finite" if record.skipped else "")
        )

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def line(self, text: str) -> None:
        self.console.print(text)

    def warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self.console.print(f"warning: {text}", style="yellow")

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
