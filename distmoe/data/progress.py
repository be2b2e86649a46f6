"""How far the preparation is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class PrepareProgress:
    """A context manager around one stage; ``update`` is cheap to call."""

    def __init__(self, console: Console, stage: str, *, total_bytes: int) -> None:
        self._console = console
        self._stage = stage
        self._total = max(1, total_bytes)
        self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> PrepareProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task(self._stage, total=self._total, note="")
            self._bar.start()
        else:
            self._console.print(f"{self._stage} ...", highlight=False)
        return self

    def update(self, done_bytes: int, note: str) -> None:
        """Source bytes that are done, and a few words beside them."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done_bytes, note=note)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            share = done_bytes / self._total
            self._console.print(f"{self._stage}: {share:.0%}, {note}", highlight=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
