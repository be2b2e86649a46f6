"""The exchanges of a run's layers under observation: figures of every step, traces, warnings."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from distmoe.comm import Exchange, Observer
from distmoe.comm.heartbeat import Heartbeats
from distmoe.comm.kernel_clock import KernelClock
from distmoe.comm.observer import ALMOST
from distmoe.comm.timeline import Timeline
from distmoe.comm.trace import RankClock, write_trace
from distmoe.comm.watchdog import Watchdog
from distmoe.config import Config
from distmoe.config.steps import parse_steps
from distmoe.metrics.reporter import is_logged
from distmoe.model.block import Block
from distmoe.model.transformer import Transformer
from distmoe.moe.layer import MoE
from distmoe.runtime import Runtime, default_store

# Seconds between two heartbeats, at most.
BEAT_S = 15.0


@dataclass(frozen=True)
class StepCommunication:
    """What the exchanges of this rank did in a step. ``exposed_seconds``: the host waited for them;
    bytes are those that it sent, to ranks on its node and on others. ``wait_cpu_seconds``: CPU time
    of the waits. ``kernel_seconds``: of the GPU in this rank's expert kernels, nan if they were not
    timed."""

    exposed_seconds: float = 0.0
    node_bytes: int = 0
    remote_bytes: int = 0
    wait_cpu_seconds: float = 0.0
    kernel_seconds: float = math.nan


@dataclass(frozen=True)
class _Tracing:
    """A trace that was begun before ``first``, the first of its steps."""

    first: int
    clock: RankClock


class Communication:
    """Observes the messages of all layers until ``close``, which ends ``watchdog`` and
    ``heartbeats``, too."""

    def __init__(
        self,
        config: Config,
        runtime: Runtime,
        model: Transformer,
        *,
        watchdog: Watchdog | None = None,
        heartbeats: Heartbeats | None = None,
    ) -> None:
        self._runtime = runtime
        self._folder = Path(config.run.dir) / "trace"
        self._timeout_s = config.launch.timeout_s
        self._trace_steps = parse_steps(config.train.trace_steps)
        self._timeline = Timeline(runtime.device)
        self._config = config
        self._kernel_clock = KernelClock()
        self._tracing: _Tracing | None = None
        self._before = StepCommunication()
        self._watchdog, self._heartbeats = watchdog, heartbeats
        self._exchanges: list[Exchange] = []
        self._observers: list[Observer] = []
        for module in model.modules():
            if isinstance(module, Block):
                self._exchanges.append(module.gather.exchange)
                self._observe(module.gather.exchange.observer, config.launch.timeout_s)
            elif isinstance(module, MoE):
                self._exchanges += module.exchanges()
                for observer in module.observers():
                    self._observe(observer, config.launch.timeout_s)

    @classmethod
    def open(cls, config: Config, runtime: Runtime, model: Transformer) -> Communication:
        """With the threads that see a rank stand still, where there are several."""
        ranks, warning_s = runtime.ranks, config.launch.stall_warning_s
        if runtime.group is None or ranks.world == 1:
            return cls(config, runtime, model)
        beat_s = min(BEAT_S, warning_s / 4)
        hearts = Heartbeats.open(default_store(), rank=ranks.rank, world=ranks.world, beat_s=beat_s)
        watchdog = Watchdog.open(ranks.rank, warning_s=warning_s, heartbeats=hearts)
        return cls(config, runtime, model, watchdog=watchdog, heartbeats=hearts)

    def _observe(self, observer: Observer, timeout_s: float) -> None:
        observer.timeout_s = timeout_s
        observer.timeline, observer.watchdog = self._timeline, self._watchdog
        observer.kernel_clock = self._kernel_clock
        self._observers.append(observer)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Collectives that are not the exchanges' own fail by the process group's timeout and do
        not say whom they waited for. If the heartbeats do, the error inside is a TimeoutError."""
        try:
            yield
        except RuntimeError as error:
            line = self._watchdog.stand_still(ALMOST * self._timeout_s) if self._watchdog else ""
            if not line:
                raise
            raise TimeoutError(line) from error

    def begin(self, step: int) -> None:
        """Before the first collective of ``step``."""
        if self._watchdog is not None:
            self._watchdog.begun_step(step)
        if step in self._trace_steps and self._tracing is None:
            self._tracing = _Tracing(step, self._common_clock())
            self._timeline.start()
        # Between traced steps, in a validation, nothing is noted.
        self._timeline.on = self._tracing is not None
        if self._runtime.device.type == "cuda" and is_logged(step, self._config):
            self._kernel_clock.begin()
        self._before = self._so_far()

    def end(self, step: int) -> tuple[StepCommunication, Path | None]:
        """After the update of ``step``, when its device is through: what it did, and the trace that
        it completed, if any."""
        before, now = self._before, self._so_far()
        used = StepCommunication(
            now.exposed_seconds - before.exposed_seconds,
            now.node_bytes - before.node_bytes,
            now.remote_bytes - before.remote_bytes,
            now.wait_cpu_seconds - before.wait_cpu_seconds,
            self._kernel_clock.end(),
        )
        self._timeline.on = False
        if self._tracing is None or step < self._trace_steps[-1]:
            return used, None
        return used, self.end_trace(step)

    def end_trace(self, step: int) -> Path | None:
        """The trace up to ``step``, if one was begun and not completed: of a run that ends within
        train.trace_steps."""
        if self._tracing is None:
            return None
        rank, tracing = self._runtime.ranks.rank, self._tracing
        self._tracing = None
        path = self._folder / f"steps-{tracing.first}-{step}-rank-{rank}.json"
        write_trace(path, self._timeline.stop(), rank=rank, clock=tracing.clock)
        return path

    def _so_far(self) -> StepCommunication:
        return StepCommunication(
            sum(observer.wait_seconds for observer in self._observers),
            sum(exchange.traffic.sent("node") for exchange in self._exchanges),
            sum(exchange.traffic.sent("remote") for exchange in self._exchanges),
            sum(observer.wait_cpu_seconds for observer in self._observers),
        )

    def _common_clock(self) -> RankClock:
        if self._runtime.group is None:
            return RankClock(time.perf_counter(), 0.0)
        # The first barrier gathers the ranks, the second one shows what a barrier takes.
        dist.barrier()
        began = time.perf_counter()
        dist.barrier()
        zero = time.perf_counter()
        return RankClock(zero, zero - began)

    def close(self) -> None:
        """End the threads; again is harmless. A trace that is still open here is of a run that
        failed, whose messages may never end: it is not waited for, and not written."""
        if self._tracing is not None:
            rank, first, self._tracing = self._runtime.ranks.rank, self._tracing.first, None
            line = f"rank {rank}: the trace that began at step {first} was not written"
            print(line, file=sys.stderr, flush=True)
        for watcher in (self._watchdog, self._heartbeats):
            if watcher is not None:
                watcher.close()
