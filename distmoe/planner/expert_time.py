"""Seconds of an expert layer on ranks whose loads differ: the mean rank and the busiest.

Nobody leaves an exchange before the busiest rank has computed its rows. Rows that a rank sends
depend on its own tokens, rows that it receives and computes on its load; `cost_model.predict` takes
both from one volume, which is that of the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distmoe.moe.schedule import Schedule
from distmoe.planner.collective_time import Transfer
from distmoe.planner.cost_model import predict
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.pass_time import PassTime
from distmoe.planner.row_volumes import RankLayout


@dataclass(frozen=True)
class ExpertPass:
    """One pass of a layer. ``busy_s`` of the mean rank, and ``mean_s`` with its waits for messages;
    ``busiest_s`` of the busiest; ``sent``: there and home, of the mean rank."""

    busy_s: float
    mean_s: float
    busiest_s: float
    sent: Transfer = Transfer()


@dataclass(frozen=True)
class ExpertTimes:
    """``backward`` includes the weight gradients."""

    forward: ExpertPass
    backward: ExpertPass

    def passes(self, recomputed: bool) -> tuple[Sequence[ExpertPass], Sequence[ExpertPass]]:
        """What the forward of a step runs, and what its backward."""
        return [self.forward], [self.forward, self.backward] if recomputed else [self.backward]


def expert_times(
    shape: LayerShape,
    layout: RankLayout,
    profile: Profile,
    schedule: Schedule,
    *,
    mean_load: float,
    busiest_load: float,
    overlap: bool,
) -> ExpertTimes:
    """Loads: pairs of a rank over the mean of all ranks under top-k."""
    mean, busiest = (
        predict(shape, layout, profile, schedule, load=load) for load in (mean_load, busiest_load)
    )

    def seconds(one: PassTime) -> float:
        return one.overlapped_s if overlap else one.serial_s

    forward, backward = (
        ExpertPass(even.busy_s, seconds(even), seconds(most), even.sent)
        for even, most in ((mean.forward, busiest.forward), (mean.backward, busiest.backward))
    )
    return ExpertTimes(forward, backward)
