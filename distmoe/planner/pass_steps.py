"""What a pass moves and runs, step by step, before anybody says how fast.

A step's rows arrive together; its block is the pairs that can run then. Of an expert's pairs that
are here, (M - 1) / 2 are expected to wait for the rest of their tile, and a block is finished with
the first later block that brings M - 1 more (the worst expert), or with the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distmoe.moe.schedule import Schedule, cut
from distmoe.planner.row_volumes import FloatArray, RowVolumes


@dataclass(frozen=True)
class Parcel:
    """What a step sends over one link class."""

    link: str
    messages: int
    rows: float


Way = tuple[Parcel, ...]
"""Hop after hop: rows of another node may come by a rank of this one."""


@dataclass(frozen=True)
class ModelStep:
    """Rows that arrive together, with their ``pairs``, over all ``ways`` at the same time."""

    pairs: float
    ways: tuple[Way, ...]


def steps_of(volumes: RowVolumes, schedule: Schedule) -> list[ModelStep]:
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


def _peers(volumes: RowVolumes, level: str) -> tuple[list[ModelStep], list[ModelStep]]:
    """What each rank of the own node sends, and each rank of the others, nearest first; at level
    node, each of the other nodes."""
    num_nodes, per_node = volumes.pairs_NG.shape
    rows_NG = volumes.pairs_NG if level == "copies" else volumes.rows_NG

    def step(n: int, l: int) -> ModelStep:
        parcel = Parcel("remote" if n else "node", 1, float(rows_NG[n, l]))
        return ModelStep(float(volumes.pairs_NG[n, l]), ((parcel,),))

    near = [step(0, l) for l in range(1, per_node)]
    nodes = range(1, num_nodes)
    if level == "node":
        return near, [_relayed(volumes, n) for n in nodes]
    return near, [step(n, l) for n in nodes for l in range(per_node)]


def _relayed(volumes: RowVolumes, n: int) -> ModelStep:
    """Rows of node ``n``: along the rail, and from there to the others of this node."""
    others = volumes.rows_NG.shape[1] - 1
    rail = Parcel("remote", 1, float(volumes.node_rows_N[n]))
    fan_out = Parcel("node", others, float(volumes.rows_NG[n, 1:].sum()))
    return ModelStep(float(volumes.pairs_NG[n].sum()), ((rail, fan_out) if others else (rail,),))


def _together(steps: Sequence[ModelStep]) -> ModelStep:
    """Several sources as one step: what goes the same way goes in one transfer."""
    ways: dict[tuple[str, ...], list[Way]] = {}
    for way in (way for step in steps for way in step.ways):
        ways.setdefault(tuple(parcel.link for parcel in way), []).append(way)
    return ModelStep(
        sum(step.pairs for step in steps),
        tuple(
            tuple(
                Parcel(hop[0].link, sum(p.messages for p in hop), sum(p.rows for p in hop))
                for hop in zip(*same_way, strict=True)
            )
            for same_way in ways.values()
        ),
    )


def _part_of(step: ModelStep, parts: int) -> ModelStep:
    return ModelStep(
        step.pairs / parts,
        tuple(tuple(Parcel(p.link, p.messages, p.rows / parts) for p in way) for way in step.ways),
    )


@dataclass(frozen=True)
class ModelBlock:
    """A step's rows with the ``pairs`` that run once they are here, and the blocks whose rows are
    all computed then."""

    ways: tuple[Way, ...]
    pairs: float
    ready: tuple[int, ...]


def carried(arrived: FloatArray, tile: int) -> FloatArray:
    """How many of an expert's ``arrived`` pairs are expected to wait for the rest of their tile."""
    return np.minimum(arrived, (tile - 1) / 2)


def blocks_of(steps: Sequence[ModelStep], *, tile: int, local_experts: int) -> list[ModelBlock]:
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
        ModelBlock(
            step.ways,
            float(runs[b]),
            tuple(j for j, finish in enumerate(finished_by) if finish == b),
        )
        for b, step in enumerate(steps)
    ]
