"""Time of an expert layer over many ranks: what a way to exchange rows will cost.

One rank stands for all: ranks are alike and work in step, so rows arrive at the pace at which this
rank sends its own (`pass_steps`), through queues for links and computing (`pass_simulation`).

forward: gather the rows to send; first part of the own rows, a block per step, rest of the own
rows; rows of a finished block go home at once; sum of the partial rows when all are back.
backward: the same with dy for x and dX for y, and all weight gradients after the last block.

Each of forward, dgrad and wgrad takes 2 H (G + I) FLOPs a pair, that is 6 I H for gated experts.
See docs/planning.md for what is left out, and for the figures that this is held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmoe.moe.schedule import Schedule
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.pass_simulation import LayerOnMachine, PassTime, time_of_pass
from distmoe.planner.pass_steps import ModelStep, blocks_of, steps_of
from distmoe.planner.row_volumes import RankLayout, RowVolumes

LEVELS = ("rank", "node", "copies")
ORDERS = ("source", "tokens")
MOST_STEPS = 16


@dataclass(frozen=True)
class Prediction:
    """One schedule with its times."""

    schedule: Schedule
    forward: PassTime
    backward: PassTime

    @property
    def total_s(self) -> float:
        """Forward and backward with overlap, which `best_schedule` ranks by."""
        return self.forward.overlapped_s + self.backward.overlapped_s


def best_schedule(
    shape: LayerShape,
    layout: RankLayout,
    profile: Profile,
    *,
    levels: Sequence[str] = LEVELS,
    orders: Sequence[str] = ORDERS,
    steps: int = 0,
    step_counts: Sequence[int] = (),
    volumes: RowVolumes | None = None,
) -> list[Prediction]:
    """Every schedule that may be chosen, the fastest first; equal ones in the order of ``levels``
    and ``orders``, with fewer steps before more. ``steps`` 0: those of ``step_counts`` up to
    `most_steps`, by default all."""
    volumes = volumes or _expected(shape, layout)
    if layout.num_ranks == 1:
        alone = Schedule(levels[0], orders[0], 1)
        return [predict(shape, layout, profile, alone, volumes=volumes)]
    every = range(1, most_steps(shape, layout) + 1)
    allowed = [steps] if steps else [n for n in every if not step_counts or n in step_counts]
    found = [
        predict(shape, layout, profile, Schedule(level, order, n), volumes=volumes)
        for level in _levels_of(layout, levels)
        for order in (orders if level != "node" else orders[-1:])
        for n in allowed
        if steps or n <= _most_steps_of(layout, level, order, most_steps(shape, layout))
    ]
    return sorted(found, key=lambda prediction: (prediction.total_s, prediction.schedule.steps))


def most_steps(shape: LayerShape, layout: RankLayout) -> int:
    """Mean pairs per expert / 2M, so that most tiles are complete when their step is here; from 1
    to `MOST_STEPS`."""
    pairs_per_expert = layout.num_ranks * shape.num_tokens * shape.top_k / shape.num_experts
    return max(1, min(MOST_STEPS, int(pairs_per_expert / (2 * shape.tile))))


def _levels_of(layout: RankLayout, levels: Sequence[str]) -> list[str]:
    """Without those that are another one under a second name, if that is among them."""
    one_level = layout.num_nodes == 1 or layout.per_node == 1
    return [v for v in levels if not (v == "node" and one_level and "rank" in levels)]


def _most_steps_of(layout: RankLayout, level: str, order: str, limit: int) -> int:
    """By source one for each peer; at level node ``limit`` over all nodes."""
    if level == "node":
        return max(1, limit // max(1, layout.num_nodes - 1))
    return limit if order == "tokens" else layout.num_ranks - 1


def predict(
    shape: LayerShape,
    layout: RankLayout,
    profile: Profile,
    schedule: Schedule,
    *,
    volumes: RowVolumes | None = None,
    own_first: float = 0.5,
) -> Prediction:
    """Times of one schedule. ``volumes``: the rows, expected ones by default. ``own_first``: share
    of the own rows that is computed before the first peer's.

    ValueError if the profile lacks a link class that the rows need, or the GEMM rate of the dtype.
    """
    volumes = volumes or _expected(shape, layout)
    machine = LayerOnMachine.of(shape, layout, profile)
    own_pairs = float(volumes.pairs_NG[0, 0])
    own = volumes.pairs_NG if schedule.level == "copies" else volumes.rows_NG
    steps = steps_of(volumes, schedule)
    if not steps:
        own_first = 1.0
    arrivals = [
        ModelStep(own_first * own_pairs, ()),
        *steps,
        *([ModelStep((1 - own_first) * own_pairs, ())] if own_first < 1 else []),
    ]
    local_experts = shape.num_experts // layout.num_ranks
    blocks = blocks_of(arrivals, tile=shape.tile, local_experts=local_experts)
    own_rows = float(own[0, 0]) if steps else 0.0
    return Prediction(
        schedule,
        forward=time_of_pass(machine, blocks, own_rows=own_rows, wgrad=False),
        backward=time_of_pass(machine, blocks, own_rows=own_rows, wgrad=True),
    )


def _expected(shape: LayerShape, layout: RankLayout) -> RowVolumes:
    return RowVolumes.expected(
        layout,
        num_tokens=shape.num_tokens,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
    )
