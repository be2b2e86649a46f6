"""What a pass moves and runs, step by step, before anybody says how fast."""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.moe.schedule import Schedule, cut
from distmoe.planner.row_volumes import RankLayout, RowVolumes


@dataclass(frozen=True)
class Parcel:
    """What a step sends over one link class."""

    messages: int = 0
    rows: float = 0.0


@dataclass(frozen=True)
class ModelStep:
    """Rows that arrive together, with their ``pairs``: those of the own node and those of others at
    the same time. ``relayed``: what comes from another node is then sent on inside the own one."""

    pairs: float
    node: Parcel
    remote: Parcel
    relayed: bool = False

    @property
    def sent_rows(self) -> float:
        """That the rank gathers from its own tokens."""
        return self.remote.rows + (0.0 if self.relayed else self.node.rows)

    @property
    def arriving_rows(self) -> float:
        """That the rank unpacks; of a relayed step those, too, that it only passes on."""
        return self.remote.rows + self.node.rows


def steps_of(layout: RankLayout, volumes: RowVolumes, schedule: Schedule) -> list[ModelStep]:
    """The steps of a schedule in their order, nearer ranks first; none for one rank."""
    near, n = layout.per_node - 1, schedule.steps
    if schedule.level == "node":
        by_rank = [_from_ranks(volumes, "node", 1, 0)] * near
        return by_rank + [_from_node(layout, volumes, n)] * (n * (layout.num_nodes - 1))
    peers = list(range(layout.num_ranks - 1))
    if not peers:
        return []
    if schedule.order == "tokens":
        return [_from_ranks(volumes, schedule.level, near, len(peers) - near, share=1 / n)] * n
    groups = [(sum(i < near for i in some), len(some)) for some in cut(peers, min(n, len(peers)))]
    return [_from_ranks(volumes, schedule.level, a, size - a) for a, size in groups]


def _from_ranks(
    volumes: RowVolumes, level: str, near: int, far: int, *, share: float = 1.0
) -> ModelStep:
    """``share`` of what ``near`` ranks of the own node and ``far`` others have."""
    rows = share * volumes.sent_rows(level)
    pairs = share * (near + far) * volumes.pairs
    return ModelStep(pairs, Parcel(near, near * rows), Parcel(far, far * rows))


def _from_node(layout: RankLayout, volumes: RowVolumes, runs: int) -> ModelStep:
    """One of ``runs`` of another node's rows: along the rail, and from there to the others."""
    others = layout.per_node - 1
    return ModelStep(
        pairs=layout.per_node * volumes.pairs / runs,
        node=Parcel(others, others * volumes.rows / runs),
        remote=Parcel(1, volumes.node_rows / runs),
        relayed=True,
    )
