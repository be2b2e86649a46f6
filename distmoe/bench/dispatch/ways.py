"""Our own ways to move rows: level, order, steps, with and without overlap."""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.moe.schedule import Schedule, auto_schedule
from distmoe.planner.row_volumes import RankLayout


@dataclass(frozen=True)
class Way:
    """How rows move. ``steps`` 0: as many as the ranks make natural."""

    level: str
    overlap: bool
    order: str = "auto"
    steps: int = 0

    @property
    def name(self) -> str:
        """Of a line of the table."""
        if not self.overlap:
            return f"{self.level}, waiting"
        return f"{self.level}, by {self.order}, {self.steps or 'auto'} steps"

    def schedule(self, layout: RankLayout) -> Schedule:
        """What it is on these ranks."""
        return auto_schedule(
            self.level,
            self.order,
            self.steps,
            num_ranks=layout.num_ranks,
            ranks_per_node=layout.per_node,
        )


def default_ways(layer_ranks: int, ranks_per_node: int, steps: list[int]) -> list[Way]:
    """Each level waiting, and overlapped by source and in the given steps by tokens."""
    levels = ["copies", "rank"]
    if 1 < ranks_per_node < layer_ranks:
        levels.append("node")
    ways = []
    for level in levels:
        ways += [Way(level, False, "source"), Way(level, True, "source")]
        ways += [Way(level, True, "tokens", count) for count in steps]
    return ways
