"""Seconds of an expert layer on every rank of an ep group, whose loads differ.

The exchange and the products of one rank are those of `cost_model`. Rows that a rank sends depend
on its own tokens, rows that it receives and computes on its load; the model of a pass takes both
from one volume, which is that of the load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from distmoe.moe.schedule import Schedule
from distmoe.planner.cost_model import predict
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.pass_simulation import PassTime
from distmoe.planner.row_volumes import FloatArray, RankLayout, RowVolumes


@dataclass(frozen=True)
class PassTimes:
    """One pass of every layer on every rank. ``seconds_LP`` with what a rank waits for its
    messages; ``busy_LP`` without. ``link_s``: a link class is busy, at mean load."""

    seconds_LP: FloatArray
    busy_LP: FloatArray
    link_s: Mapping[str, float]

    @cached_property
    def slowest_L(self) -> list[float]:
        """Seconds of the busiest rank."""
        return [float(seconds) for seconds in self.seconds_LP.max(1)]

    @cached_property
    def mean_L(self) -> list[float]:
        """Seconds of the mean rank."""
        return [float(seconds) for seconds in self.seconds_LP.mean(1)]

    @cached_property
    def mean_busy_L(self) -> list[float]:
        """Without its waits for messages."""
        return [float(seconds) for seconds in self.busy_LP.mean(1)]


@dataclass(frozen=True)
class ExpertTimes:
    """``backward`` includes the weight gradients, of which nobody has to wait for another's."""

    forward: PassTimes
    backward: PassTimes


def expert_times(
    shape: LayerShape,
    layout: RankLayout,
    profile: Profile,
    schedule: Schedule,
    load_LP: FloatArray,
    *,
    overlap: bool,
) -> ExpertTimes:
    """By interpolation between the lightest and the busiest rank."""
    lightest, busiest = float(load_LP.min()), float(load_LP.max())
    volumes = RowVolumes.expected(
        layout, num_tokens=shape.num_tokens, num_experts=shape.num_experts, top_k=shape.top_k
    )
    low, high = (
        predict(shape, layout, profile, schedule, volumes=_scaled(volumes, load))
        for load in (lightest, busiest)
    )
    share_LP = (load_LP - lightest) / max(busiest - lightest, 1e-9)
    return ExpertTimes(
        forward=_between(low.forward, high.forward, share_LP, overlap=overlap),
        backward=_between(low.backward, high.backward, share_LP, overlap=overlap),
    )


def _scaled(volumes: RowVolumes, load: float) -> RowVolumes:
    return replace(
        volumes,
        pairs_NG=volumes.pairs_NG * load,
        rows_NG=volumes.rows_NG * load,
        node_rows_N=volumes.node_rows_N * load,
    )


def _between(low: PassTime, high: PassTime, share_LP: FloatArray, *, overlap: bool) -> PassTimes:
    def seconds(one: PassTime) -> float:
        return one.overlapped_s if overlap else one.serial_s

    mean = float(share_LP.mean())
    return PassTimes(
        seconds_LP=np.asarray(seconds(low) + share_LP * (seconds(high) - seconds(low))),
        busy_LP=np.asarray(low.busy_s + share_LP * (high.busy_s - low.busy_s)),
        link_s={
            link: low.link_s[link] + mean * (high.link_s[link] - low.link_s[link])
            for link in low.link_s
        },
    )
