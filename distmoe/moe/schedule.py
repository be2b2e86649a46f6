"""In which order the rows of a layer travel and are computed: blocks of runs of rows.

The rows that a rank has for another are cut into equal *runs*. A *block* is the runs that arrive
together and are then computed. First comes one half of the rank's own rows, which needs nobody,
then the steps, then the other half, which hides the last rows' way home.

`source`: every step brings all rows of some ranks, the next ones by distance; in the same step the
rank sends to those that are as far in the other direction. `tokens`: every step brings one run of
every rank's rows.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("copies", "rank")
ORDERS = ("source", "tokens")


@dataclass(frozen=True)
class Part:
    """The run ``run`` of the rows between this rank and ``rank``."""

    rank: int
    run: int


@dataclass(frozen=True)
class Step:
    """What arrives in one block, and what this rank sends in the same transfer."""

    receives: list[Part]
    sends: list[Part]


@dataclass(frozen=True)
class Schedule:
    """``level``: `rank` sends a token once to every rank that has one of its experts, `copies`
    once for every expert. ``steps``: of `source` at most P - 1."""

    level: str = "rank"
    order: str = "source"
    steps: int = 1

    def runs(self) -> int:
        """Into how many runs the rows for another rank are cut."""
        return self.steps if self.order == "tokens" else 1

    def blocks(self, rank: int, num_ranks: int) -> list[Step]:
        """All blocks in the order of work, the halves of the own rows (runs 0 and 1) among them."""
        own = [Step([Part(rank, half)], []) for half in range(OWN_RUNS)]
        return [own[0], *self._steps(rank, num_ranks), own[1]]

    def _steps(self, rank: int, num_ranks: int) -> list[Step]:
        distances = list(range(1, num_ranks))
        if self.order == "tokens":
            groups = [(distances, run) for run in range(self.steps)]
        else:
            groups = [(some, 0) for some in cut(distances, min(self.steps, len(distances)))]
        return [
            Step(
                receives=[Part((rank - d) % num_ranks, run) for d in some],
                sends=[Part((rank + d) % num_ranks, run) for d in some],
            )
            for some, run in groups
        ]


# The own rows are computed in halves, before and after everybody else's.
OWN_RUNS = 2


def cut(items: list[int], parts: int) -> list[list[int]]:
    """Consecutive parts whose lengths differ by at most one."""
    bounds = [len(items) * part // parts for part in range(parts + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def auto_schedule(level: str, order: str, steps: int, *, num_ranks: int) -> Schedule:
    """What ``auto`` (0 for ``steps``) stands for without a model of the links: up to 8 ranks a step
    for every other rank, above four runs of everybody's rows. ValueError for an unknown name."""
    if level == "auto":
        level = "rank"
    if order == "auto":
        order = "source" if num_ranks <= 8 else "tokens"
    for what, name, known in (("level", level, LEVELS), ("order", order, ORDERS)):
        if name not in known:
            raise ValueError(f"{what} is {name!r}; it must be one of auto, {', '.join(known)}")
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be at least 0")
    if steps == 0:
        steps = max(1, num_ranks - 1) if order == "source" else 4
    return Schedule(level, order, steps)
