"""starts.jsonl: when a run was started and how each start ended."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from distmoe.metrics.cut_lines import cut_after

START, END = "start", "end"

# Why a start ended whose training loop raised.
ERROR = "an error"


class StartLog:
    """Two lines a start, on rank 0. A start without an ``end`` runs, or was killed. ``step``: the
    last one that is done."""

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._step, self._ended = path, step, False

    @classmethod
    def open(cls, path: Path, *, resumed_step: int, facts: dict[str, Any]) -> StartLog:
        """Cut what a resume takes back, and note this start with ``facts`` of its ranks."""
        cut_after(path, resumed_step)
        log = cls(path, resumed_step)
        log._write({"event": START, "step": resumed_step, "time": time.time(), **facts})
        return log

    def at(self, step: int) -> None:
        """``step`` is done."""
        self._step = step

    def end(self, stopped: str, *, seconds: float, checkpoint_seconds: float = 0.0) -> None:
        """The start ends after ``seconds``; ``stopped``: by what, "" if all steps are done;
        ``checkpoint_seconds``: lost to saves after the last step. Again is harmless."""
        if self._ended:
            return
        self._ended = True
        line = {"event": END, "step": self._step, "time": time.time(), "stopped": stopped}
        self._write({**line, "seconds": seconds, "checkpoint_seconds": checkpoint_seconds})

    def _write(self, values: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(values) + "\n")
