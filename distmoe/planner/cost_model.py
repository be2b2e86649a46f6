"""Time of an expert layer over many ranks: what a way to exchange rows will cost.

One rank stands for all: ranks are alike and work in step. `pass_steps` says what is sent and run
step by step, `pass_time` how long that takes.

forward: gather the rows to send; first half of the own rows, a block per step, the other half;
rows of a finished block go home at once; sum of the partial rows when all are back.
backward: the same with dy for x and dX for y, and all weight gradients after the last block.

Each of forward, dgrad and wgrad takes 2 H (G + I) FLOPs a pair, that is 6 I H for gated experts.
See docs/planning.md for what is left out, and for the figures that this is held to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmoe.moe.schedule import ORDERS, Schedule
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.pass_steps import steps_of
from distmoe.planner.pass_time import LayerOnMachine, PassTime, time_of_pass
from distmoe.planner.row_volumes import RankLayout, RowVolumes

LEVELS = ("rank", "node", "copies")
"""Of equal ones the first is taken."""
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
) -> list[Prediction]:
    """Every schedule that may be chosen, the fastest first; equal ones in the order of ``levels``
    and ``orders``, with fewer steps before more. ``steps`` 0: all up to `most_steps`."""
    if layout.num_ranks == 1:
        alone = Schedule(levels[0], orders[0], 1)
        return [predict(shape, layout, profile, alone)]
    allowed = [steps] if steps else range(1, most_steps(shape, layout) + 1)
    found = [
        predict(shape, layout, profile, Schedule(level, order, n))
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
    load: float = 1.0,
) -> Prediction:
    """Times of one schedule on a rank with ``load`` times the mean rows and pairs.

    ValueError if the profile lacks a link class that the rows need, or a rate of the dtype.
    """
    volumes = RowVolumes.expected(
        layout, num_tokens=shape.num_tokens, num_experts=shape.num_experts, top_k=shape.top_k
    ).times(load)
    machine = LayerOnMachine.of(shape, layout, profile)
    steps = steps_of(layout, volumes, schedule)
    forward, backward = (
        time_of_pass(
            machine,
            steps,
            tokens=shape.num_tokens,
            own_pairs=volumes.pairs,
            own_rows=volumes.sent_rows(schedule.level),
            wgrad=wgrad,
        )
        for wgrad in (False, True)
    )
    return Prediction(schedule, forward, backward)
