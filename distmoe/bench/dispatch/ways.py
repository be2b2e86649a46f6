"""Our own ways to move rows: level, order, steps, with and without overlap, as long as they are
computed or shorter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from distmoe.moe.row_formats import TravelFormats
from distmoe.moe.schedule import Schedule, auto_schedule
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.row_volumes import RankLayout


@dataclass(frozen=True)
class Way:
    """How rows move. ``steps`` 0: as many as the ranks make natural. ``row_dtype``,
    ``sum_dtype``: as in `DispatchConfig`."""

    level: str
    overlap: bool
    order: str = "auto"
    steps: int = 0
    row_dtype: str = "computed"
    sum_dtype: Literal["computed", "bf16"] = "computed"

    @property
    def name(self) -> str:
        """Of a line of the table."""
        rows = "" if self.row_dtype == "computed" else f", {self.row_dtype} rows"
        if not self.overlap:
            return f"{self.level}, waiting{rows}"
        return f"{self.level}, by {self.order}, {self.steps or 'auto'} steps{rows}"

    @property
    def travel(self) -> TravelFormats:
        """In what form rows travel."""
        return TravelFormats.of(self)

    def shape(self, shape: LayerShape) -> LayerShape:
        """``shape`` with rows that travel so."""
        return replace(shape, row_dtype=self.row_dtype, sum_dtype=self.sum_dtype)

    def schedule(self, layout: RankLayout) -> Schedule:
        """What it is on these ranks."""
        return auto_schedule(
            self.level,
            self.order,
            self.steps,
            num_ranks=layout.num_ranks,
            ranks_per_node=layout.per_node,
        )


def default_ways(
    layer_ranks: int, ranks_per_node: int, steps: list[int], row_dtypes: Sequence[str] = ()
) -> list[Way]:
    """Each level waiting, and overlapped by source and in the given steps by tokens; but for
    copies by source in each of ``row_dtypes``, too, with partial sums in bf16."""
    levels = ["copies", "rank"]
    if 1 < ranks_per_node < layer_ranks:
        levels.append("node")
    ways = []
    for level in levels:
        ways += [Way(level, False, "source"), Way(level, True, "source")]
        ways += [Way(level, True, "tokens", count) for count in steps]
        if level != "copies":
            ways += [
                Way(level, True, "source", row_dtype=name, sum_dtype="bf16") for name in row_dtypes
            ]
    return ways
