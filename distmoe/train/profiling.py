"""What train.profile and train.memory_snapshot ask for, on the ranks that they ask."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from distmoe.config import Config, ConfigError
from distmoe.config.profiling_rules import NO_HISTORY
from distmoe.config.rank_list import parse_ranks
from distmoe.config.steps import parse_steps
from distmoe.runtime import Runtime
from distmoe.train.memory_snapshots import MemorySnapshots
from distmoe.train.step_profiler import StepProfiler


class StepRecorder(Protocol):
    """Something that records a run of steps."""

    def step(self, step: int) -> AbstractContextManager[None]:
        """Around the work of ``step``."""
        ...

    def is_complete(self, step: int) -> bool:
        """Whether ``step`` was the last one to record, and nothing is written yet."""
        ...

    def write(self, step: int) -> list[str]:
        """Write what was recorded up to ``step``; lines for the console. OSError."""
        ...

    def close(self) -> str:
        """End without files; what is lost, in words."""
        ...


class Profiling:
    """Records steps of this rank until `close`, and explains an error of its device's memory.

    ConfigError if snapshots of a memory are asked for that keeps no history.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        train, ranks = config.train, runtime.ranks
        if train.memory_snapshot and runtime.device.type != "cuda":
            problem = f"train.memory_snapshot is {train.memory_snapshot}; it must {NO_HISTORY}"
            raise ConfigError(problem)
        self._runtime, self._folder = runtime, Path(config.run.dir) / "profile"
        self._ranks = parse_ranks(train.profile_ranks, ranks.world)
        profiled, remembered = parse_steps(train.profile), parse_steps(train.memory_snapshot)
        self._windows = [steps for steps in (profiled, remembered) if steps]
        if ranks.rank not in self._ranks:
            profiled = remembered = range(0)
        self._recorders: list[StepRecorder] = [
            MemorySnapshots(remembered, self._folder, rank=ranks.rank),
            StepProfiler(profiled, self._folder, rank=ranks.rank),
        ]

    @property
    def is_on(self) -> bool:
        """Whether any rank records any step."""
        return bool(self._windows)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around the work of ``step``."""
        with ExitStack() as recording:
            for recorder in self._recorders:
                recording.enter_context(recorder.step(step))
            yield

    def end(self, step: int) -> list[str]:
        """After ``step``: what it completed, in lines for the console. All ranks wait here for
        those that write."""
        if not any(step == window[-1] for window in self._windows):
            return []
        return self._write([r for r in self._recorders if r.is_complete(step)], step)

    def finish(self, step: int) -> list[str]:
        """After the last step of this start: what was begun and not completed."""
        if not any(step in window[:-1] for window in self._windows):
            return []
        return self._write(self._recorders, step)

    def _write(self, recorders: list[StepRecorder], step: int) -> list[str]:
        ranks = ", ".join(map(str, self._ranks))
        lines = [f"profiles up to step {step}: {self._folder}, of ranks {ranks}"]
        for recorder in recorders:
            try:
                lines += recorder.write(step)
            except OSError as error:
                self._complain(f"a profile up to step {step} is not written: {error}")
        if self._runtime.group is not None:
            dist.barrier()
        return lines

    def close(self) -> None:
        """End; again is harmless. What is still open here is of a run that failed: it is not
        written."""
        for recorder in self._recorders:
            if lost := recorder.close():
                self._complain(f"{lost} was not written")

    def _complain(self, line: str) -> None:
        print(f"rank {self._runtime.ranks.rank}: {line}", file=sys.stderr, flush=True)
