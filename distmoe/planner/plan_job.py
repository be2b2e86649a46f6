"""What every layout of a job will need and take; those that fit, the fastest first."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from distmoe.config import Config, ConfigError, resolve
from distmoe.config.keys import with_values
from distmoe.moe.schedule import Schedule
from distmoe.planner.expert_time import ExpertTimes, expert_times
from distmoe.planner.hardware import Hardware, on_hardware
from distmoe.planner.job_memory import JobMemory, predict_memory
from distmoe.planner.job_stages import job_stages
from distmoe.planner.job_time import StepTime, step_time
from distmoe.planner.layouts import differing, layouts, problems_of
from distmoe.planner.routing_skew import rank_loads
from distmoe.planner.row_volumes import RankLayout
from distmoe.planner.schedule_policy import layer_shape, ranked_schedules
from distmoe.registry import ENGINE_COSTS

AUTO = {"level": "auto", "order": "auto", "steps": 0}
"""The dispatch settings, as they are called when they are free."""


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
        per_node = self.hardware.ranks_per_node
        every = [
            self._layout(config, pinned)
            for config in layouts(self.config, self.world, ranks_per_node=per_node, pinned=pinned)
        ]
        # Of equals, the smaller.
        every.sort(key=lambda layout: (layout.time.seconds, layout.memory.total))
        fitting = [layout for layout in every if self.fits(layout.memory)]
        faster = [
            layout
            for layout in one_of_each([one for one in every if not self.fits(one.memory)])
            if not fitting or layout.time.seconds < fitting[0].time.seconds
        ]
        impossible = problems_of(self.config, self.world, per_node)
        return Plan(
            best=fitting[:top],
            misfits=[_misfit(layout, fitting) for layout in faster[:misfits]],
            as_written=None if impossible else self.layout(self.config),
            impossible=impossible,
            tried=len(every),
            fitting=len(fitting),
        )

    def layout(self, config: Config) -> Layout:
        """What a possible config will need and take; where its dispatch is auto, the best one."""
        resolved = resolve(config, self.world, local_world=self.hardware.ranks_per_node)
        return self._layout(resolved, [f"moe.dispatch.{name}" for name in AUTO])

    def memory(self, config: Config, world: int, pinned: Collection[str]) -> JobMemory:
        """Of a resolved config on ``world`` ranks, with its best exchange."""
        exchange = self._exchange(config, pinned)
        return predict_memory(exchange.applied_to(config), world, skew=exchange.busiest)

    def fits(self, memory: JobMemory) -> bool:
        return memory.total <= self.hardware.memory_bytes

    def _layout(self, config: Config, pinned: Collection[str]) -> Layout:
        """Of a resolved config."""
        exchange = self._exchange(config, pinned)
        config = exchange.applied_to(config)
        return Layout(
            config=config,
            memory=predict_memory(config, self.world, skew=exchange.busiest),
            time=step_time(
                config,
                self.world,
                job_stages(config, self.hardware, dtype=self._dtype),
                exchange.times,
                peak_flops=self.hardware.peak_flops if self._dtype == "bf16" else None,
            ),
        )

    def _exchange(self, config: Config, pinned: Collection[str]) -> _Exchange:
        """The same for every layout with that micro-batch and ep."""
        dispatch = config.moe.dispatch
        settings = {
            name: getattr(dispatch, name) if f"moe.dispatch.{name}" in pinned else auto
            for name, auto in AUTO.items()
        }
        key = (config.train.micro_batch_size, config.parallel.ep, *settings.values())
        if key not in self._exchanges:
            names = {f"moe.dispatch.{name}": value for name, value in settings.items()}
            self._exchanges[key] = self._best_exchange(with_values(config, names))
        return self._exchanges[key]

    def _best_exchange(self, config: Config) -> _Exchange:
        if config.model.n_layers == config.model.n_dense_layers:
            return _Exchange(Schedule("rank", "source", 1), None, 1.0)
        ep, profile = config.parallel.ep, self.hardware.profile
        shape = layer_shape(config, dtype=self._dtype)
        layout = RankLayout.of_group(ep, self.hardware.ranks_per_node)
        # GPUs do not relay, as in `train.agreed_schedule`.
        relays = config.run.device == "cpu"
        schedule = ranked_schedules(config, layout, profile, relays=relays)[0].schedule
        load_LP = rank_loads(config.moe, tokens=shape.num_tokens, ep=ep, skew=self._skew)
        busiest = float(load_LP.max(1).mean())
        times = expert_times(
            shape,
            layout,
            profile,
            schedule,
            mean_load=float(load_LP.mean()),
            busiest_load=busiest,
            overlap=config.moe.dispatch.overlap,
        )
        return _Exchange(schedule, times, busiest)


def check_engine(name: str) -> None:
    """ConfigError unless a plan knows the engine."""
    if name != "auto" and name not in ENGINE_COSTS:
        raise ConfigError(
            f"parallel.engine is '{name}'; distmoe plan knows {', '.join(ENGINE_COSTS)}: another "
            "needs a line of registry.ENGINE_COSTS"
        )


def one_of_each(every: Sequence[Layout]) -> list[Layout]:
    """The first of those that differ only in the ranks that share parameters."""
    found: dict[tuple[object, ...], Layout] = {}
    for layout in every:
        parallel, train = layout.config.parallel, layout.config.train
        kind = (parallel.engine, parallel.ep, train.micro_batch_size, train.activation_checkpoint)
        found.setdefault(kind, layout)
    return list(found.values())


def _misfit(layout: Layout, fitting: Sequence[Layout]) -> Misfit:
    """With the layout that fits and differs in the fewest settings; of equals, the fastest."""

    def distance(other: Layout) -> int:
        # dp_shard follows from dp_replicate.
        return len(differing(layout.config, other.config).keys() - {"parallel.dp_shard"})

    near = min(fitting, key=distance, default=None)
    changes = {} if near is None else differing(layout.config, near.config)
    return Misfit(layout, changes, near)
