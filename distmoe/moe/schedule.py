"""In which order the rows of a layer travel and are computed: blocks of runs of rows.

The rows that a rank has for another are cut into *runs*. A *block* is the runs that arrive together
and are then computed. First comes one half of the rank's own rows, which needs nobody, then the
steps, the nearer ranks before the farther ones, then the other half, which hides the last rows'
way home.

`source`: every step brings all rows of some ranks, the next ones by distance; in the same step the
rank sends to those that are as far in the other direction. `tokens`: every step brings one run of
every rank's rows. Level `node` has an order of its own: first the ranks of the own node, one by
one; then node by node, by distance, all ranks of the node at once, in ``steps`` runs each.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVELS = ("copies", "rank", "node")
ORDERS = ("source", "tokens")

# The own rows are computed in halves, before and after everybody else's.
OWN_RUNS = 2

# Of `auto` without a model of the links.
MOST_RANKS_BY_SOURCE = 8
MOST_RUNS = 4


@dataclass(frozen=True)
class Part:
    """The run ``run`` of the rows between this rank and ``rank``."""

    rank: int
    run: int


@dataclass(frozen=True)
class Step:
    """What arrives in one block, and what this rank sends in the same transfer. ``relayed``: over
    ranks of the same place in their nodes, which pass the rows on."""

    receives: list[Part]
    sends: list[Part]
    relayed: bool = False


@dataclass(frozen=True)
class Schedule:
    """``level``: `copies` sends a token's row once for every expert, `rank` once to every rank that
    has one of its experts, `node` once to every other node that has. ``steps``: of `source` at most
    P - 1; of `node` those of each other node. ``ranks_per_node``: of level `node`."""

    level: str = "rank"
    order: str = "source"
    steps: int = 1
    ranks_per_node: int = 0

    def runs(self) -> int:
        """Into how many runs the rows for another rank (of another node) are cut."""
        return self.steps if self.level == "node" or self.order == "tokens" else 1

    def blocks(self, rank: int, num_ranks: int) -> list[Step]:
        """All blocks in the order of work, the halves of the own rows (runs 0 and 1) among them."""
        own = [Step([Part(rank, half)], []) for half in range(OWN_RUNS)]
        steps = self._by_node if self.level == "node" else self._flat
        return [own[0], *steps(rank, num_ranks), own[1]]

    def _flat(self, rank: int, num_ranks: int) -> list[Step]:
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

    def _by_node(self, rank: int, num_ranks: int) -> list[Step]:
        width = self.ranks_per_node
        node, place = divmod(rank, width)
        num_nodes = num_ranks // width
        near = [
            Step(
                receives=[Part(node * width + (place - d) % width, 0)],
                sends=[Part(node * width + (place + d) % width, 0)],
            )
            for d in range(1, width)
        ]
        far = []
        for d in range(1, num_nodes):
            source, target = (node - d) % num_nodes, (node + d) % num_nodes
            for run in range(self.steps):
                far.append(
                    Step(
                        receives=[Part(source * width + g, run) for g in range(width)],
                        sends=[Part(target * width + place, run)],
                        relayed=True,
                    )
                )
        return [*near, *far]


def cut(items: list[int], parts: int) -> list[list[int]]:
    """Consecutive parts whose lengths differ by at most one, the last one short: what comes last
    is hidden by little."""
    bounds = [-(-len(items) * part // parts) for part in range(parts + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


def auto_schedule(
    level: str,
    order: str,
    steps: int,
    *,
    num_ranks: int,
    ranks_per_node: int = 0,
    relays: bool = True,
    most_runs: int = MOST_RUNS,
) -> Schedule:
    """What ``auto`` (0 for ``steps``) stands for without a model of the links: the node level where
    there are several nodes; up to 8 ranks a step for every other rank, above and between nodes
    ``most_runs`` runs of everybody's rows. ``relays``: whether auto may take level node.

    ValueError for an unknown name, or nodes that do not divide the ranks.
    """
    width = ranks_per_node if 0 < ranks_per_node < num_ranks else num_ranks
    if num_ranks % width:
        if level == "node":
            raise ValueError(
                f"ranks_per_node is {ranks_per_node}; it must divide the {num_ranks} ranks"
            )
        width = num_ranks
    _check_known(level, order, steps)
    several_nodes = 1 < width < num_ranks
    if level == "auto":
        level = "node" if relays and several_nodes else "rank"
    # With one node, or one rank in each, a row for a node is a row for a rank.
    if level == "node" and not several_nodes:
        level = "rank"
    if order == "auto":
        pairwise = level != "node" and num_ranks <= MOST_RANKS_BY_SOURCE
        order = "source" if pairwise else "tokens"
    if steps == 0 and order == "source" and level != "node":
        steps = max(1, min(num_ranks, MOST_RANKS_BY_SOURCE) - 1)
    return Schedule(level, order, steps or most_runs, width if level == "node" else 0)


def _check_known(level: str, order: str, steps: int) -> None:
    for what, name, known in (("level", level, LEVELS), ("order", order, ORDERS)):
        if name not in ("auto", *known):
            raise ValueError(f"{what} is {name!r}; it must be one of auto, {', '.join(known)}")
    if steps < 0:
        raise ValueError(f"steps is {steps}; it must be at least 0")
