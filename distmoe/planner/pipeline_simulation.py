"""A discrete simulation of one micro-batch through the layers, on all ranks of an ep group.

Every rank has a clock. Ranks meet where they need each other: at the exchange of an expert layer,
which no rank leaves before the busiest has computed its rows, and at the collectives of parameters,
which go one after the other beside the layers: a block's are gathered while the block before runs,
and its gradients are reduced while the next one runs backward. Other ep groups of a job have the
same layers, hence the same loads: one stands for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distmoe.planner.collective_time import Transfer
from distmoe.planner.expert_time import ExpertTimes, PassTimes
from distmoe.planner.row_volumes import FloatArray


@dataclass(frozen=True)
class Stage:
    """Some layers that are gathered together.

    ``forward_s``, ``backward_s``: all but the experts, alike on every rank. ``expert_layer``: index
    of its layer of experts, which come last in the forward and first in the backward; -1: none.
    ``gather``, ``gather_again``: before forward and backward; ``reduce``: after the backward.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    expert_layer: int = -1
    gather: Transfer = Transfer()
    gather_again: Transfer = Transfer()
    reduce: Transfer = Transfer()


@dataclass(frozen=True)
class PipelineTime:
    """Of one micro-batch: ``seconds`` until the last rank is done; the mean rank's time for experts
    (``busy_s``), its waits for messages of its exchanges (``exposed_s``) and for ranks with more to
    compute (``straggler_s``)."""

    seconds: float
    busy_s: float
    exposed_s: float
    straggler_s: float


def simulate(
    stages: Sequence[Stage],
    experts: ExpertTimes | None,
    *,
    recomputes_experts: bool = False,
    hides_reductions: bool = True,
) -> PipelineTime:
    """Forward and backward through ``stages``; ``experts`` of all their expert layers."""
    ranks = experts.forward.seconds_LP.shape[1] if experts is not None else 1
    run = _Run(np.zeros(ranks), hides_reductions)
    run.gather(stages[0].gather)
    for i, stage in enumerate(stages):
        run.begin(stages[i + 1].gather if i + 1 < len(stages) else Transfer())
        run.clock_P = run.clock_P + stage.forward_s
        if experts is not None and stage.expert_layer >= 0:
            run.exchange(experts.forward, stage.expert_layer, stage.gather)
    run.gather(stages[-1].gather_again)
    for i in reversed(range(len(stages))):
        stage = stages[i]
        run.begin(stages[i - 1].gather_again if i else Transfer())
        if experts is not None and stage.expert_layer >= 0:
            if recomputes_experts:
                run.exchange(experts.forward, stage.expert_layer, stage.gather_again)
            run.exchange(experts.backward, stage.expert_layer, stage.reduce, needed=experts.forward)
        run.clock_P = run.clock_P + stage.backward_s
        run.reduce(stage.reduce)
    return PipelineTime(run.end(), run.busy_s, run.exposed_s, run.straggler_s)


class _Run:
    """Clocks of the ranks, and the queue of collectives."""

    def __init__(self, clock_P: FloatArray, hides_reductions: bool) -> None:
        self.clock_P = clock_P
        self.busy_s = self.exposed_s = self.straggler_s = 0.0
        self._hides_reductions = hides_reductions
        self._collectives_free = 0.0
        self._gathered = 0.0

    def gather(self, transfer: Transfer) -> None:
        """Post a gather that the next stage waits for."""
        if transfer.seconds:
            self._collect(transfer)
            self._gathered = self._collectives_free

    def begin(self, following: Transfer) -> None:
        """Enter a stage whose parameters were asked for; ask for those of the ``following``."""
        ready = self._gathered
        self.gather(following)
        self.clock_P = np.maximum(self.clock_P, ready)

    def reduce(self, transfer: Transfer) -> None:
        if transfer.seconds:
            self._collect(transfer)
            if not self._hides_reductions:
                self.clock_P = np.full_like(self.clock_P, self._collectives_free)

    def exchange(
        self,
        passes: PassTimes,
        layer: int,
        beside: Transfer,
        *,
        needed: PassTimes | None = None,
    ) -> None:
        """A pass through experts. A rank is done when its own work is, and when the rows that it
        needs are back from the busiest: those of ``needed``, whose weight gradients come later;
        by default of ``passes``. Collectives like ``beside`` share the link that limits them."""
        begin = float(self.clock_P.max())
        back = (needed or passes).slowest_L[layer]
        end_P = begin + np.maximum(passes.seconds_LP[layer], back)
        busy, own = passes.mean_busy_L[layer], passes.mean_L[layer]
        self.busy_s += busy
        self.exposed_s += max(0.0, own - busy)
        self.straggler_s += _mean(end_P) - own - _mean(self.clock_P)
        link = "remote" if beside.remote_s >= beside.node_s else "node"
        self._collectives_free = max(self._collectives_free, begin) + passes.link_s.get(link, 0.0)
        self.clock_P = end_P

    def end(self) -> float:
        return max(float(self.clock_P.max()), self._collectives_free)

    def _collect(self, transfer: Transfer) -> None:
        """A collective begins when all ranks are there and the one before is over."""
        begin = max(self._collectives_free, float(self.clock_P.max()))
        self._collectives_free = begin + transfer.seconds


def _mean(clock_P: FloatArray) -> float:
    return float(clock_P.sum()) / len(clock_P)
