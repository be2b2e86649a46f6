"""What every layout of a job will need and take; those that fit, the fastest first."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distmoe.config import Config, ConfigError, resolve
from distmoe.config.keys import with_values
from distmoe.moe.schedule import Schedule
from distmoe.planner.cost_model import ORDERS, best_schedule
from distmoe.planner.expert_time import ExpertTimes, expert_times
from distmoe.planner.hardware import Hardware, on_hardware
from distmoe.planner.job_memory import JobMemory, predict_memory
from distmoe.planner.job_stages import JobStages, job_stages
from distmoe.planner.job_time import StepTime, least_seconds, step_time
from distmoe.planner.layouts import differing, layouts, problems_of
from distmoe.planner.routing_skew import rank_loads
from distmoe.planner.row_volumes import FloatArray, RankLayout
from distmoe.planner.schedule_policy import layer_shape
from distmoe.registry import ENGINE_COSTS

STEP_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Steps of the exchange that are tried, unless their number is given."""
AUTO = {"level": "auto", "order": "auto", "steps": 0}
"""What the dispatch settings are called when they are free."""
LEVELS = {"cpu": ("rank", "node"), "gpu": ("rank",)}
"""What level auto may be: GPUs do not relay, as in `train.agreed_schedule`; a copy for every expert
is never faster than a row for every rank."""


@dataclass(frozen=True)
class Layout:
    """One way to run the job. ``config`` is resolved and names its dispatch."""

    config: Config
    memory: JobMemory
    time: StepTime


@dataclass(frozen=True)
class Misfit:
    """A layout that needs more memory than there is, the fewest settings to change, with their
    values, until it fits, and what it is then; none if nothing fits."""

    layout: Layout
    changes: dict[str, Any]
    changed: Layout | None


@dataclass(frozen=True)
class Plan:
    """``best``: those that fit, the fastest first. ``misfits``: the fastest that do not, of those
    that are faster than all that do, and apart from how parameters are sharded one of each.
    ``as_written``: the layout of the config itself, None if that is impossible, and then why.
    ``tried``, ``fitting``: how many layouts."""

    best: list[Layout]
    misfits: list[Misfit]
    as_written: Layout | None
    impossible: list[str]
    tried: int
    fitting: int


@dataclass(frozen=True)
class _Exchange:
    """The experts of all layers with one micro-batch and ep. ``busiest``: pairs of the busiest rank
    over the mean, in the mean over the layers."""

    schedule: Schedule
    times: ExpertTimes | None
    busiest: float

    def applied_to(self, config: Config) -> Config:
        """``config`` with the schedule, if anything travels."""
        if config.parallel.ep == 1:
            return config
        names = {f"moe.dispatch.{name}": getattr(self.schedule, name) for name in AUTO}
        return with_values(config, names)


@dataclass(frozen=True)
class _Sketch:
    """A layout before it is simulated; ``config`` names its dispatch; ``least_s``: no step is
    shorter."""

    config: Config
    stages: JobStages
    exchange: _Exchange
    memory: JobMemory
    least_s: float


class Planner:
    """Predictions for one config on one machine; ``skew`` as of `routing_skew`. ConfigError for an
    engine of which no traffic or no memory is known."""

    def __init__(self, config: Config, world: int, hardware: Hardware, *, skew: float) -> None:
        check_engine(config.parallel.engine)
        self.config, self.world, self.hardware = on_hardware(config, hardware), world, hardware
        self._skew = skew
        self._dtype = self.config.train.dtype
        self._exchanges: dict[tuple[object, ...], _Exchange] = {}

    def plan(self, *, pinned: Collection[str], top: int, misfits: int = 3) -> Plan:
        """Every layout that ``pinned`` keys leave; ``top`` of those that fit."""
        sketches = [
            self._sketch(config, pinned)
            for config in layouts(
                self.config,
                self.world,
                ranks_per_node=self.hardware.ranks_per_node,
                pinned=pinned,
            )
        ]
        fitting = [sketch for sketch in sketches if self.fits(sketch.memory)]
        best = self._fastest(fitting, top)
        too_large = [sketch for sketch in sketches if not self.fits(sketch.memory)]
        others = self._fastest(one_of_each(too_large), misfits)
        impossible = problems_of(self.config, self.world, self.hardware.ranks_per_node)
        return Plan(
            best=best,
            misfits=[
                self._misfit(layout, fitting)
                for layout in others
                if not best or layout.time.seconds < best[0].time.seconds
            ],
            as_written=None if impossible else self.layout(self.config),
            impossible=impossible,
            tried=len(sketches),
            fitting=len(fitting),
        )

    def layout(self, config: Config) -> Layout:
        """What a possible config will need and take; where its dispatch is auto, the best one."""
        resolved = resolve(config, self.world, local_world=self.hardware.ranks_per_node)
        return self._simulated(self._sketch(resolved, [f"moe.dispatch.{name}" for name in AUTO]))

    def memory(self, config: Config, world: int, pinned: Collection[str]) -> JobMemory:
        """Of a resolved config on ``world`` ranks, with its best exchange."""
        exchange = self._exchange(config, pinned)
        return predict_memory(exchange.applied_to(config), world, skew=exchange.busiest)

    def fits(self, memory: JobMemory) -> bool:
        return memory.total <= self.hardware.memory_bytes

    def _fastest(self, sketches: Sequence[_Sketch], count: int) -> list[Layout]:
        """Simulated until no other can be among the first ``count``; of equals, the smaller."""
        found: list[Layout] = []
        slowest: list[float] = []
        for sketch in sorted(sketches, key=lambda sketch: sketch.least_s):
            if len(slowest) == count and (not count or sketch.least_s > -slowest[0]):
                break
            layout = self._simulated(sketch)
            found.append(layout)
            heapq.heappush(slowest, -layout.time.seconds)
            if len(slowest) > count:
                heapq.heappop(slowest)
        return sorted(found, key=lambda layout: (layout.time.seconds, layout.memory.total))[:count]

    def _misfit(self, layout: Layout, fitting: Sequence[_Sketch]) -> Misfit:
        near = nearest(layout.config, fitting)
        if near is None:
            return Misfit(layout, {}, None)
        return Misfit(layout, differing(layout.config, near.config), self._simulated(near))

    def _sketch(self, config: Config, pinned: Collection[str]) -> _Sketch:
        exchange = self._exchange(config, pinned)
        config = exchange.applied_to(config)
        stages = job_stages(config, self.hardware, dtype=self._dtype)
        least_s = least_seconds(config, stages)
        if exchange.times is not None:
            passes = (exchange.times.forward, exchange.times.backward)
            micro_batches = (
                config.train.global_batch_size // self.world // config.train.micro_batch_size
            )
            least_s += micro_batches * sum(sum(one.slowest_L) for one in passes)
        return _Sketch(
            config=config,
            stages=stages,
            exchange=exchange,
            memory=predict_memory(config, self.world, skew=exchange.busiest),
            least_s=least_s,
        )

    def _simulated(self, sketch: _Sketch) -> Layout:
        return Layout(
            config=sketch.config,
            memory=sketch.memory,
            time=step_time(
                sketch.config,
                self.world,
                sketch.stages,
                sketch.exchange.times,
                peak_flops=self.hardware.peak_flops if self._dtype == "bf16" else None,
            ),
        )

    def _exchange(self, config: Config, pinned: Collection[str]) -> _Exchange:
        """The same for every layout with that micro-batch and ep."""
        given = _given_dispatch(config, pinned)
        key = (config.train.micro_batch_size, config.parallel.ep, *given.values())
        if key not in self._exchanges:
            self._exchanges[key] = self._best_exchange(config, pinned)
        return self._exchanges[key]

    def _best_exchange(self, config: Config, pinned: Collection[str]) -> _Exchange:
        num_layers = config.model.n_layers - config.model.n_dense_layers
        if not num_layers:
            return _Exchange(Schedule("rank", "source", 1), None, 1.0)
        ep, shape = config.parallel.ep, layer_shape(config, dtype=self._dtype)
        per_node = min(ep, self.hardware.ranks_per_node)
        layout = RankLayout(ep, per_node if ep % per_node == 0 else ep)
        expert_flops = self.hardware.expert_flops(shape, ep)
        profile = replace(self.hardware.profile, gemm_flops={self._dtype: expert_flops})
        given = _given_dispatch(config, pinned)
        device = "cpu" if config.run.device == "cpu" else "gpu"
        found = best_schedule(
            shape,
            layout,
            profile,
            levels=(given["level"],) if "level" in given else LEVELS[device],
            orders=(given["order"],) if "order" in given else ORDERS,
            steps=given.get("steps", 0),
            step_counts=STEP_COUNTS,
        )
        load_LP = self._loads(config, num_layers)
        times = expert_times(
            shape,
            layout,
            profile,
            found[0].schedule,
            load_LP,
            overlap=config.moe.dispatch.overlap,
        )
        return _Exchange(found[0].schedule, times, float(load_LP.max(1).mean()))

    def _loads(self, config: Config, num_layers: int) -> FloatArray:
        return rank_loads(
            config.moe,
            tokens=config.train.micro_batch_size * config.data.seq_len,
            ep=config.parallel.ep,
            num_layers=num_layers,
            skew=self._skew,
        )


def check_engine(name: str) -> None:
    """ConfigError unless a plan knows the engine."""
    if name != "auto" and name not in ENGINE_COSTS:
        raise ConfigError(
            f"parallel.engine is '{name}'; distmoe plan knows {', '.join(ENGINE_COSTS)}: another "
            "needs a line of registry.ENGINE_COSTS"
        )


def one_of_each(sketches: Sequence[_Sketch]) -> list[_Sketch]:
    """The fastest of those that differ only in the ranks that share parameters."""
    found: dict[tuple[object, ...], _Sketch] = {}
    for sketch in sketches:
        parallel, train = sketch.config.parallel, sketch.config.train
        kind = (parallel.engine, parallel.ep, train.micro_batch_size, train.activation_checkpoint)
        if kind not in found or sketch.least_s < found[kind].least_s:
            found[kind] = sketch
    return list(found.values())


def nearest(config: Config, fitting: Sequence[_Sketch]) -> _Sketch | None:
    """The layout that differs in the fewest settings; of equals, the fastest."""

    def distance(sketch: _Sketch) -> tuple[int, float]:
        # dp_shard follows from dp_replicate.
        changes = differing(config, sketch.config).keys() - {"parallel.dp_shard"}
        return len(changes), sketch.least_s

    return min(fitting, key=distance, default=None)


def _given_dispatch(config: Config, pinned: Collection[str]) -> dict[str, Any]:
    """Level, order and steps of the exchange, of those that are pinned and not auto."""
    given = {name: getattr(config.moe.dispatch, name) for name in AUTO}
    return {
        name: value
        for name, value in given.items()
        if f"moe.dispatch.{name}" in pinned and value != AUTO[name]
    }
