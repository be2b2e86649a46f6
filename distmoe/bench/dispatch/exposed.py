"""The time of communication that computation did not hide: as our accounting reports it, and by the
clock, against the same pass with transfers that take no time.

In turn: the layer with its transfers, under a timeline; the same plan over exchanges that only fill
what they should receive with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.bench.dispatch.layer import Layer
from distmoe.bench.dispatch.measure import run
from distmoe.bench.dispatch.subjects import OwnWay
from distmoe.bench.dispatch.ways import Way
from distmoe.comm import Exchange, Transfer
from distmoe.comm.exposure import exposures
from distmoe.comm.node_links import NodeLinks
from distmoe.comm.timeline import Timeline
from distmoe.comm.transport import Transport
from distmoe.moe.timed_mlp import TimedMlp


class FreeExchange(Transport):
    """Of the size of ``exchange``: everything has arrived as soon as it is posted."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.rank, list(range(exchange.size)))
        self.ranks_per_node = exchange.ranks_per_node

    def _receive(self, transfer: Transfer) -> None:
        for rows in transfer.recv.values():
            rows.zero_()

    def _send(self, transfer: Transfer) -> None:
        """Nobody is waiting for it."""

    def _gather(self, x: Tensor) -> Tensor:
        raise AssertionError("plans are made over the real exchange")


@dataclass(frozen=True)
class Exposed:
    """Of one way on one rank, a figure a round: wall seconds of forward and backward, the same with
    free transfers, and the seconds that the accounting calls exposed in the former."""

    name: str
    wall_s: list[float]
    free_s: list[float]
    accounted_s: list[float]


def measure_exposed(layer: Layer, ways: Sequence[Way], *, rounds: int) -> list[Exposed]:
    """Every way in turn, after one round that is not counted; collective."""
    timeline = Timeline(torch.device("cpu"))
    pairs = [_real_and_free(layer, way, timeline) for way in ways]
    found = [Exposed(way.name, [], [], []) for way in ways]
    for number in range(1 + rounds):
        for exposed, (real, free) in zip(found, pairs, strict=True):
            timeline.start()
            wall_s = math.fsum(run(layer, real))
            accounted_s = sum(of.exposed for of in exposures(timeline.stop()))
            free_s = math.fsum(run(layer, free))
            if number:
                exposed.wall_s.append(wall_s)
                exposed.free_s.append(free_s)
                exposed.accounted_s.append(accounted_s)
    return found


def _real_and_free(layer: Layer, way: Way, timeline: Timeline) -> tuple[OwnWay, OwnWay]:
    observer = layer.exchange.observer
    real = OwnWay(layer, way, mlp=TimedMlp(layer.mlp, observer))
    for exchange in real.exchanges():
        exchange.observer.layer, exchange.observer.timeline = "layer", timeline
    links = None
    if real.ep.links is not None:
        links = NodeLinks(*(FreeExchange(exchange) for exchange in real.ep.links.all()))
    return real, OwnWay(
        layer, way, plan=real.plan, exchange=FreeExchange(layer.exchange), links=links
    )
