"""Discrete events of one forward or backward of an expert layer on one rank.

The rank has a queue per link class, in which a transfer of m messages and n bytes takes
`host latency + m alpha + n / beta`, and a compute queue that runs blocks in their order.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Profile
from distmoe.planner.pass_steps import ModelBlock, Parcel, Way
from distmoe.planner.row_volumes import RankLayout


@dataclass(frozen=True)
class PassTime:
    """Seconds of one forward or backward on one rank; ``bytes_sent`` and ``link_s``, the time that
    a link is busy, by link class. ``serial_s`` waits for every transfer at once."""

    serial_s: float
    overlapped_s: float
    gemm_s: float
    launch_s: float
    copy_s: float
    bytes_sent: Mapping[str, float]
    link_s: Mapping[str, float]

    @property
    def busy_s(self) -> float:
        """What the rank computes, copies and launches."""
        return self.gemm_s + self.launch_s + self.copy_s

    @property
    def exposed_s(self) -> float:
        """What the rank waits for communication, with overlap."""
        return max(0.0, self.overlapped_s - self.busy_s)

    @property
    def exposed_share(self) -> float:
        """Of the overlapped time."""
        return self.exposed_s / self.overlapped_s if self.overlapped_s else 0.0


@dataclass(frozen=True)
class LayerOnMachine:
    """The profile in the units of one layer: seconds of a pair, a copied row, a parcel."""

    profile: Profile
    per_node: int
    row_bytes: int
    pair_s: float

    @staticmethod
    def of(shape: LayerShape, layout: RankLayout, profile: Profile) -> LayerOnMachine:
        if shape.dtype not in profile.gemm_flops:
            raise ValueError(
                f"the profile has no GEMM rate for {shape.dtype}; it has "
                f"{', '.join(profile.gemm_flops) or 'none'}"
            )
        pair_s = shape.flops_per_pair / profile.gemm_flops[shape.dtype]
        return LayerOnMachine(profile, layout.per_node, shape.row_bytes, pair_s)

    def parcel_s(self, parcel: Parcel) -> float:
        link = self.profile.link(parcel.link)
        rate = link.bytes_per_s / (self.per_node if link.shared else 1)
        seconds = parcel.messages * link.latency_s + parcel.rows * self.row_bytes / rate
        return self.profile.host_latency_s + seconds

    def copy_s(self, rows: float) -> float:
        """Of ``rows`` inside the device; nothing to copy takes no launch."""
        own = self.profile.link("own")
        return own.latency_s + rows * self.row_bytes / own.bytes_per_s if rows else 0.0

    def run_s(self, pairs: float) -> float:
        return self.profile.host_latency_s + pairs * self.pair_s


def time_of_pass(
    machine: LayerOnMachine, blocks: Sequence[ModelBlock], *, own_rows: float, wgrad: bool
) -> PassTime:
    """Both runs of one pass: with overlap and without."""
    pairs = sum(block.pairs for block in blocks)
    sent = [[way[0].rows for way in block.ways] for block in blocks]
    gather_s = [machine.copy_s(sum(rows)) for rows in sent]
    place_s = machine.copy_s(own_rows)
    sum_s = machine.copy_s(own_rows + sum(sum(rows) for rows in sent))
    times = _Times(
        gather_s=gather_s,
        place_s=place_s,
        block_s=[machine.run_s(block.pairs) for block in blocks],
        wgrad_s=machine.run_s(pairs) if wgrad else 0.0,
        sum_s=sum_s,
    )
    parcels = [parcel for block in blocks for way in block.ways for parcel in way]
    links = dict.fromkeys(parcel.link for parcel in parcels)
    launches = len(blocks) + wgrad
    return PassTime(
        serial_s=_Rank(machine, blocks, times, overlap=False).run(),
        overlapped_s=_Rank(machine, blocks, times, overlap=True).run(),
        gemm_s=(1 + wgrad) * pairs * machine.pair_s,
        launch_s=launches * machine.profile.host_latency_s,
        copy_s=sum(gather_s) + place_s + sum_s,
        # Rows go there, and partial sums come the same way back.
        bytes_sent={
            link: 2 * machine.row_bytes * sum(p.rows for p in parcels if p.link == link)
            for link in links
        },
        link_s={
            link: 2 * sum(machine.parcel_s(p) for p in parcels if p.link == link) for link in links
        },
    )


@dataclass(frozen=True)
class _Times:
    """Seconds of everything in the compute queue, in its order; lists are block by block."""

    gather_s: Sequence[float]
    place_s: float
    block_s: Sequence[float]
    wgrad_s: float
    sum_s: float


class _Rank:
    """Discrete events of one pass on one rank. Transfers of a link class go in the order in which
    they are posted; blocks run in their order. Without overlap every transfer is waited for."""

    def __init__(
        self, machine: LayerOnMachine, blocks: Sequence[ModelBlock], times: _Times, *, overlap: bool
    ) -> None:
        self._machine = machine
        self._blocks = blocks
        self._times = times
        self._overlap = overlap
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = count()
        self._link_free: dict[str, float] = {}
        self._missing = [len(block.ways) for block in blocks]
        self._travelling = 0
        self._next = 0
        # The device gathers, copies or computes, or the host waits for what it has sent.
        self._occupied = True
        self._finished_s = 0.0

    def run(self) -> float:
        """Seconds until the sum over the partial rows is made."""
        self._send_out(0, 0.0)
        while self._events:
            now, _, action = heapq.heappop(self._events)
            action(now)
        return self._finished_s + self._times.sum_s

    def _at(self, time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._numbers), action))

    def _send_out(self, b: int, now: float) -> None:
        """Gather and post the rows of block ``b``, then of the next ones."""
        if b == len(self._blocks):
            self._at(now + self._times.place_s, self._compute)
        else:
            self._at(now + self._times.gather_s[b], partial(self._post, b))

    def _post(self, b: int, now: float) -> None:
        ways = self._blocks[b].ways
        self._travelling += len(ways)
        for way in ways:
            self._send(way, partial(self._arrived, b), now)
        if self._overlap or not ways:
            self._send_out(b + 1, now)

    def _send(self, way: Way, arrived: Callable[[float], None], now: float) -> None:
        if not way:
            arrived(now)
            return
        begin = max(now, self._link_free.get(way[0].link, 0.0))
        end = self._link_free[way[0].link] = begin + self._machine.parcel_s(way[0])
        self._at(end, partial(self._send, way[1:], arrived))

    def _arrived(self, b: int, now: float) -> None:
        self._missing[b] -= 1
        self._travelling -= 1
        if not self._overlap and not self._travelling:
            self._send_out(b + 1, now)
        elif not self._occupied:
            self._compute(now)

    def _came_home(self, now: float) -> None:
        self._travelling -= 1
        self._finished_s = max(self._finished_s, now)
        if not self._occupied:
            self._compute(now)

    def _compute(self, now: float) -> None:
        """Start the next block, if its rows are here."""
        self._occupied = False
        self._finished_s = max(self._finished_s, now)
        if self._next > len(self._blocks) or (self._travelling and not self._overlap):
            return
        if self._next == len(self._blocks):
            seconds = self._times.wgrad_s
        elif self._missing[self._next]:
            return
        else:
            seconds = self._times.block_s[self._next]
        self._occupied = True
        self._at(now + seconds, self._end_of_block)

    def _end_of_block(self, now: float) -> None:
        if self._next < len(self._blocks):
            for j in self._blocks[self._next].ready:
                for way in self._blocks[j].ways:
                    self._travelling += 1
                    self._send(way[::-1], self._came_home, now)
        self._next += 1
        self._compute(now)
