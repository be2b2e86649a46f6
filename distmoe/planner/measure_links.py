"""Latency and rate of every link class, by transfers of the exchange that training uses.

Every transfer goes both ways at once, as in the layer: a rank sends to one peer while it receives
from one. All ranks of a class are busy at the same time, shift by shift: in a node every rank sends
to the one `shift` places further, and between nodes to the rank of its own place that many nodes
further. Then one pair is measured alone. A message of n bytes is taken to need
latency + n / rate seconds; both are fitted through the smallest and the largest message.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distmoe.comm import Exchange
from distmoe.planner.machine_profile import Link
from distmoe.planner.row_volumes import RankLayout
from distmoe.planner.timing import repeats_for, wait_for

SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 20, 1 << 23)
"""Bytes of a message."""
BUDGET_S = 0.3
"""Of the repeats of one size."""
LONG_S = 0.5
"""A size that takes longer is the last: larger ones teach nothing about a slow link."""
ALL_GATHERS = 20
SHARED_BELOW = 0.67
"""A link is shared by the ranks of a node if each has less than this share of a pair alone."""


@dataclass(frozen=True)
class LinkFigures:
    """One class. ``fit``: medians over its pairs, all busy at the same time; ``alone``: of one
    pair. ``worst``: (source, target, bytes/s) of the slowest pair. ``curve``: (bytes, median
    seconds) of the first shift on this rank."""

    name: str
    fit: Link
    alone: Link
    worst: tuple[int, int, float]
    curve: list[tuple[int, float]]

    def link(self, per_node: int) -> Link:
        """For the cost model, with ``per_node`` ranks on a node."""
        latency, rate = self.fit.latency_s, self.fit.bytes_per_s
        if self.name == "remote" and per_node > 1 and rate < SHARED_BELOW * self.alone.bytes_per_s:
            return Link(latency, rate * per_node, shared=True)
        return Link(latency, rate)


def measure_links(
    exchange: Exchange, *, ranks_per_node: int, device: torch.device
) -> list[LinkFigures]:
    """The classes that these ranks have, "node" and "remote". Collective; ranks differ in the curve
    only."""
    layout = RankLayout(exchange.size, ranks_per_node)
    probe = _Probe(exchange, device)
    shifts = {
        "node": [_node_shift(layout, exchange.rank, s) for s in range(1, layout.per_node)],
        "remote": [_rail_shift(layout, exchange.rank, s) for s in range(1, layout.num_nodes)],
    }
    return [_measure_class(name, probe, peers) for name, peers in shifts.items() if peers]


def measure_all_gather(exchange: Exchange, num_values: int, *, device: torch.device) -> float:
    """Median seconds of the gather of ``num_values`` int32 from every rank; collective."""
    values = torch.zeros(num_values, dtype=torch.int32, device=device)
    seconds = []
    for _ in range(ALL_GATHERS):
        begun = time.perf_counter()
        exchange.all_gather(values, kind="probe")
        wait_for(device)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


@dataclass(frozen=True)
class _Peers:
    """Whom a rank sends to and receives from; nobody: it looks on."""

    to: int | None
    source: int | None


def _node_shift(layout: RankLayout, rank: int, shift: int) -> _Peers:
    G = layout.per_node
    first, place = rank - rank % G, rank % G
    return _Peers(first + (place + shift) % G, first + (place - shift) % G)


def _rail_shift(layout: RankLayout, rank: int, shift: int) -> _Peers:
    step, P = shift * layout.per_node, layout.num_ranks
    return _Peers((rank + step) % P, (rank - step) % P)


def _first_pair(rank: int, peer_of_first: int) -> _Peers:
    other = {0: peer_of_first, peer_of_first: 0}.get(rank)
    return _Peers(other, other)


@dataclass(frozen=True)
class _Pair:
    """What ``target`` received from ``source``."""

    source: int
    target: int
    fit: Link


def _measure_class(name: str, probe: _Probe, shifts: Sequence[_Peers]) -> LinkFigures:
    curve = _curve(probe, shifts[0])
    largest = curve[-1][0]
    others = [probe.fit(shift, largest) for shift in shifts[1:]]
    pairs = _all_pairs(probe, shifts, [Link.through(curve[0], curve[-1]), *others])
    first_source = next(pair.source for pair in pairs if pair.target == 0)
    alone = probe.fit(_first_pair(probe.exchange.rank, first_source), largest)
    latency, rate = probe.gathered([alone.latency_s, alone.bytes_per_s])[0]
    worst = min(pairs, key=lambda pair: pair.fit.bytes_per_s)
    return LinkFigures(
        name=name,
        fit=Link(
            statistics.median(pair.fit.latency_s for pair in pairs),
            statistics.median(pair.fit.bytes_per_s for pair in pairs),
        ),
        alone=Link(latency, rate),
        worst=(worst.source, worst.target, worst.fit.bytes_per_s),
        curve=curve,
    )


def _curve(probe: _Probe, shift: _Peers) -> list[tuple[int, float]]:
    curve: list[tuple[int, float]] = []
    for size in SIZES:
        median, slowest = probe.median(shift, size)
        curve.append((size, median))
        if slowest > LONG_S:
            break
    return curve


def _all_pairs(probe: _Probe, shifts: Sequence[_Peers], fits: Sequence[Link]) -> list[_Pair]:
    """The fits of every rank, in the order of ranks, then shifts."""
    pairs = []
    for shift, fit in zip(shifts, fits, strict=True):
        source = float(probe.exchange.rank if shift.source is None else shift.source)
        table = probe.gathered([source, fit.latency_s, fit.bytes_per_s])
        pairs += [
            _Pair(int(source), target, Link(latency, rate))
            for target, (source, latency, rate) in enumerate(table)
        ]
    return pairs


class _Probe:
    """Timed transfers of this rank. All ranks make the same calls; those without peers look on."""

    def __init__(self, exchange: Exchange, device: torch.device) -> None:
        self.exchange = exchange
        self._device = device
        self._sent = torch.ones(SIZES[-1], dtype=torch.uint8, device=device)
        self._received = torch.empty_like(self._sent)

    def fit(self, peers: _Peers, largest: int) -> Link:
        """Through the smallest message and one of ``largest`` bytes."""
        small, _ = self.median(peers, SIZES[0])
        large, _ = self.median(peers, largest)
        return Link.through((SIZES[0], small), (largest, large))

    def median(self, peers: _Peers, size: int) -> tuple[float, float]:
        """Seconds until the rows of this rank are here, and the same of the slowest rank, once."""
        # The first transfer between two ranks makes their connection.
        self._transfer(peers, size)
        slowest = max(seconds for (seconds,) in self.gathered([self._transfer(peers, size)]))
        repeats = repeats_for(slowest, BUDGET_S)
        return statistics.median(self._transfer(peers, size) for _ in range(repeats)), slowest

    def gathered(self, figures: list[float]) -> list[list[float]]:
        mine = torch.tensor(figures, dtype=torch.float64, device=self._device)
        everyone: list[list[float]] = self.exchange.all_gather(mine, kind="probe").tolist()
        return everyone

    def _transfer(self, peers: _Peers, size: int) -> float:
        recv = {} if peers.source is None else {peers.source: self._received[:size]}
        send = {} if peers.to is None else {peers.to: self._sent[:size]}
        if size > SIZES[0]:
            # Start together, or a slow pair delays its neighbours' next transfer. Small messages
            # keep step by themselves, and the end of a barrier is not sharp enough for them.
            self.gathered([0.0])
        wait_for(self._device)
        begun = time.perf_counter()
        transfer = self.exchange.post_recv("probe", recv)
        self.exchange.post_send(transfer, send)
        self.exchange.wait_recv(transfer)
        wait_for(self._device)
        seconds = time.perf_counter() - begun
        self.exchange.wait_send(transfer)
        return seconds
