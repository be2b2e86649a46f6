"""Bytes that a rank has sent, by kind of message and by how far they went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Distance = Literal["node", "remote"]


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks, by kind of message; own rows never count.
    ``bytes_by_distance``: the same by (kind, distance): "node" is a peer on the same machine.
    ``rounds``: collectives and transfers, in each of which every rank takes part."""

    bytes_sent: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    bytes_by_distance: Counter[tuple[str, Distance]] = field(default_factory=Counter)

    def begin(self, kind: str) -> None:
        self.rounds[kind] = self.rounds.get(kind, 0) + 1

    def add(self, kind: str, num_bytes: int, distance: Distance) -> None:
        if num_bytes:
            self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + num_bytes
            self.bytes_by_distance[kind, distance] += num_bytes

    def sent(self, distance: Distance) -> int:
        """Bytes of all kinds to peers at ``distance``."""
        return sum(
            count for (_, where), count in self.bytes_by_distance.items() if where == distance
        )
