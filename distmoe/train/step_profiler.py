"""torch.profiler over some steps of one rank, and the files that it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import profiler

from distmoe.named_range import named_range
from distmoe.train.operator_table import (
    STEP_MARK,
    operator_costs,
    range_costs,
    table,
    together,
)

# Lines of the tables on the console, and in the file.
SHORT, LONG = 10, 40


class StepProfiler:
    """Records ``steps`` of this rank, and writes them into ``folder`` when the last one is done.

    The step before the first one is the profiler's warm-up, if this start of the run makes it:
    on CUDA the first recorded step would else have the time in which CUPTI starts.
    """

    def __init__(self, steps: range, folder: Path, *, rank: int) -> None:
        self._steps, self._folder, self._rank = steps, folder, rank
        self._profile: profiler.profile | None = None
        self._first = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of ``step``."""
        if self._profile is None and (step in self._steps or step + 1 in self._steps):
            self._profile = profiler.profile(record_shapes=True, profile_memory=True)
            self._profile.prepare_trace()
        if self._profile is not None and not self._first and step in self._steps:
            self._profile.start_trace()
            self._first = step
        # The name by which TensorBoard's plug-in knows a step.
        with named_range(f"{STEP_MARK}{step}"):
            yield

    def is_complete(self, step: int) -> bool:
        """Whether ``step`` was the last one to record, and nothing is written yet."""
        return bool(self._first) and step >= self._steps[-1]

    def write(self, step: int) -> list[str]:
        """The files of what was recorded up to ``step``, and the operators in lines; nothing if
        nothing was. OSError if they cannot be written."""
        recorded, first = self._profile, self._first
        self._discard()
        if recorded is None or not first:
            return []
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"steps-{first}-{step}-rank-{self._rank}"
        path = self._folder / f"{name}.pt.trace.json.gz"
        # Its ending decides whether it is compressed.
        beside = path.with_name(f".{path.name}")
        recorded.export_chrome_trace(str(beside))
        beside.replace(path)
        events = recorded.key_averages()
        title = f"operators of steps {first}-{step} on rank {self._rank}, by their own time"
        operators, ranges = operator_costs(events), range_costs(events)
        own, steps = together(operators), ranges[0]
        nested = "named ranges, with all inside, over the steps; ranges lie in each other"
        parts = [
            *table(title, operators, whole=own, most=LONG),
            "",
            *table(nested, ranges, whole=steps, most=LONG),
            "",
            events.table(sort_by="self_cpu_time_total"),
        ]
        (self._folder / f"{name}.operators.txt").write_text("\n".join(parts))
        return table(title, operators, whole=own, most=SHORT)

    def close(self) -> str:
        """End without files. What is lost, in words; nothing if nothing was recorded."""
        first = self._first
        self._discard()
        return f"the profile that began at step {first}" if first else ""

    def _discard(self) -> None:
        if self._profile is not None:
            if not self._first:
                # One that was only warmed up cannot be stopped.
                self._profile.start_trace()
            self._profile.stop_trace()
        self._profile, self._first = None, 0
