"""Time of an expert layer over many ranks: what a way to exchange rows will cost.

One rank stands for all: ranks are alike and work in step, so rows arrive at the pace at which this
rank sends its own. It has a queue per link class, in which a transfer of m messages and n bytes
takes `host latency + m alpha + n / beta`, and a compute queue that runs blocks in their order:

forward: gather the rows to send; first part of the own rows, a block per step, rest of the own
rows; rows of a finished block go home at once; sum of the partial rows when all are back.
backward: the same with dy for x and dX for y, and all weight gradients after the last block.

A block runs the tiles that are complete. Of an expert's pairs that are here, (M - 1) / 2 are
expected to wait for the rest of their tile, and a block is finished with the first later block that
brings M - 1 more (the worst expert), or with the last one. Each of forward, dgrad and wgrad takes
2 H (G + I) FLOPs a pair, that is 6 I H for gated experts. See docs/planning.md for what is left
out, and for the figures that this is held to.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np

from distmoe.moe.schedule import Schedule, cut
from distmoe.planner.machine_profile import Profile
from distmoe.planner.row_volumes import FloatArray, RankLayout, RowVolumes

LEVELS = ("rank", "node", "copies")
ORDERS = ("source", "tokens")
ITEMSIZE = {"bf16": 2, "fp32": 4}
MOST_STEPS = 16


@dataclass(frozen=True)
class LayerShape:
    """T tokens on each rank, H, I, E experts in all, K, tile M; ``dtype`` is bf16 or fp32."""

    num_tokens: int
    hidden: int
    intermediate: int
    num_experts: int
    top_k: int
    tile: int = 128
    dtype: str = "bf16"
    gated: bool = True

    @property
    def row_bytes(self) -> int:
        return self.hidden * ITEMSIZE[self.dtype]

    @property
    def flops_per_pair(self) -> int:
        """Of the forward, of dgrad, and of wgrad."""
        z_width = (2 if self.gated else 1) * self.intermediate
        return 2 * self.hidden * (z_width + self.intermediate)


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
    volumes: RowVolumes | None = None,
) -> list[Prediction]:
    """Every schedule that may be chosen, the fastest first; equal ones in the order of ``levels``
    and ``orders``, with fewer steps before more. ``steps`` 0: from 1 to `most_steps`."""
    volumes = volumes or _expected(shape, layout)
    if layout.num_ranks == 1:
        alone = Schedule(levels[0], orders[0], 1)
        return [predict(shape, layout, profile, alone, volumes=volumes)]
    allowed = [steps] if steps else range(1, most_steps(shape, layout) + 1)
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
    machine = _Machine.of(shape, layout, profile)
    own_pairs = float(volumes.pairs_NG[0, 0])
    own = volumes.pairs_NG if schedule.level == "copies" else volumes.rows_NG
    steps = _steps(volumes, schedule)
    if not steps:
        own_first = 1.0
    arrivals = [
        _Step(own_first * own_pairs, ()),
        *steps,
        *([_Step((1 - own_first) * own_pairs, ())] if own_first < 1 else []),
    ]
    local_experts = shape.num_experts // layout.num_ranks
    blocks = _blocks(arrivals, tile=shape.tile, local_experts=local_experts)
    own_rows = float(own[0, 0]) if steps else 0.0
    return Prediction(
        schedule,
        forward=_time_of_pass(machine, blocks, own_rows=own_rows, wgrad=False),
        backward=_time_of_pass(machine, blocks, own_rows=own_rows, wgrad=True),
    )


def _expected(shape: LayerShape, layout: RankLayout) -> RowVolumes:
    return RowVolumes.expected(
        layout,
        num_tokens=shape.num_tokens,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
    )


@dataclass(frozen=True)
class _Parcel:
    """What a step sends over one link class."""

    link: str
    messages: int
    rows: float


_Way = tuple[_Parcel, ...]
"""Hop after hop: rows of another node may come by a rank of this one."""


@dataclass(frozen=True)
class _Step:
    """Rows that arrive together, with their ``pairs``, over all ``ways`` at the same time."""

    pairs: float
    ways: tuple[_Way, ...]


def _steps(volumes: RowVolumes, schedule: Schedule) -> list[_Step]:
    """The steps of a schedule in their order; none for one rank."""
    near, far = _peers(volumes, schedule.level)
    if schedule.level == "node":
        return [
            *near,
            *(_part_of(node, schedule.steps) for node in far for _ in range(schedule.steps)),
        ]
    by_source = [*near, *far]
    if not by_source:
        return []
    if schedule.order == "tokens":
        return [_part_of(_together(by_source), schedule.steps)] * schedule.steps
    groups = min(schedule.steps, len(by_source))
    numbers = cut(list(range(len(by_source))), groups)
    return [_together([by_source[i] for i in some]) for some in numbers]


def _peers(volumes: RowVolumes, level: str) -> tuple[list[_Step], list[_Step]]:
    """What each rank of the own node sends, and each rank of the others, nearest first; at level
    node, each of the other nodes."""
    num_nodes, per_node = volumes.pairs_NG.shape
    rows_NG = volumes.pairs_NG if level == "copies" else volumes.rows_NG

    def step(n: int, l: int) -> _Step:
        parcel = _Parcel("remote" if n else "node", 1, float(rows_NG[n, l]))
        return _Step(float(volumes.pairs_NG[n, l]), ((parcel,),))

    near = [step(0, l) for l in range(1, per_node)]
    nodes = range(1, num_nodes)
    if level == "node":
        return near, [_relayed(volumes, n) for n in nodes]
    return near, [step(n, l) for n in nodes for l in range(per_node)]


def _relayed(volumes: RowVolumes, n: int) -> _Step:
    """Rows of node ``n``: along the rail, and from there to the others of this node."""
    others = volumes.rows_NG.shape[1] - 1
    rail = _Parcel("remote", 1, float(volumes.node_rows_N[n]))
    fan_out = _Parcel("node", others, float(volumes.rows_NG[n, 1:].sum()))
    return _Step(float(volumes.pairs_NG[n].sum()), ((rail, fan_out) if others else (rail,),))


def _together(steps: Sequence[_Step]) -> _Step:
    """Several sources as one step: what goes the same way goes in one transfer."""
    ways: dict[tuple[str, ...], list[_Way]] = {}
    for way in (way for step in steps for way in step.ways):
        ways.setdefault(tuple(parcel.link for parcel in way), []).append(way)
    return _Step(
        sum(step.pairs for step in steps),
        tuple(
            tuple(
                _Parcel(hop[0].link, sum(p.messages for p in hop), sum(p.rows for p in hop))
                for hop in zip(*same_way, strict=True)
            )
            for same_way in ways.values()
        ),
    )


def _part_of(step: _Step, parts: int) -> _Step:
    return _Step(
        step.pairs / parts,
        tuple(tuple(_Parcel(p.link, p.messages, p.rows / parts) for p in way) for way in step.ways),
    )


@dataclass(frozen=True)
class _Block:
    """A step's rows with the ``pairs`` that run once they are here, and the blocks whose rows are
    all computed then."""

    ways: tuple[_Way, ...]
    pairs: float
    ready: tuple[int, ...]


def carried(arrived: FloatArray, tile: int) -> FloatArray:
    """How many of an expert's ``arrived`` pairs are expected to wait for the rest of their tile."""
    return np.minimum(arrived, (tile - 1) / 2)


def _blocks(steps: Sequence[_Step], *, tile: int, local_experts: int) -> list[_Block]:
    arrived = np.cumsum([step.pairs for step in steps]) / local_experts
    done = arrived - carried(arrived, tile)
    done[-1] = arrived[-1]
    last = len(steps) - 1
    finished_by = [
        next((b for b in range(j, last) if arrived[b] >= arrived[j] + tile - 1), last)
        for j in range(len(steps))
    ]
    runs = np.diff(done, prepend=0.0) * local_experts
    return [
        _Block(
            step.ways,
            float(runs[b]),
            tuple(j for j, finish in enumerate(finished_by) if finish == b),
        )
        for b, step in enumerate(steps)
    ]


@dataclass(frozen=True)
class _Machine:
    """The profile in the units of one layer: seconds of a pair, a copied row, a parcel."""

    profile: Profile
    per_node: int
    row_bytes: int
    pair_s: float

    @staticmethod
    def of(shape: LayerShape, layout: RankLayout, profile: Profile) -> _Machine:
        if shape.dtype not in profile.gemm_flops:
            raise ValueError(
                f"the profile has no GEMM rate for {shape.dtype}; it has "
                f"{', '.join(profile.gemm_flops) or 'none'}"
            )
        pair_s = shape.flops_per_pair / profile.gemm_flops[shape.dtype]
        return _Machine(profile, layout.per_node, shape.row_bytes, pair_s)

    def parcel_s(self, parcel: _Parcel) -> float:
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


def _time_of_pass(
    machine: _Machine, blocks: Sequence[_Block], *, own_rows: float, wgrad: bool
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
        self, machine: _Machine, blocks: Sequence[_Block], times: _Times, *, overlap: bool
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

    def _send(self, way: _Way, arrived: Callable[[float], None], now: float) -> None:
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
