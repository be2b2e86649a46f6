"""Rows that one rank sends in one direction, expected under uniform routing.

With D(g) = g (1 - C(E - E/g, K) / C(E, K)), the number of distinct groups out of g equal groups of
experts that a token's K experts touch, a token has K / P pairs for each rank, crosses to each rank
as D(P) / P rows if it travels once per rank, and to each of N nodes as D(N) / N rows if it travels
once per node (the formula of DeepEP's get_expected_topk).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb


@dataclass(frozen=True)
class RankLayout:
    """P = ``num_ranks`` ranks that share the experts, ``per_node`` of them on each node."""

    num_ranks: int
    per_node: int

    def __post_init__(self) -> None:
        if not 1 <= self.per_node <= self.num_ranks or self.num_ranks % self.per_node:
            raise ValueError(
                f"per_node is {self.per_node}; it must divide the number of ranks "
                f"({self.num_ranks})"
            )

    @staticmethod
    def of_group(size: int, ranks_per_node: int) -> RankLayout:
        """As the layer sees an ep group of ``size``: where it does not fit the nodes, it sends as
        in one."""
        fits = 0 < ranks_per_node < size and size % ranks_per_node == 0
        return RankLayout(size, ranks_per_node if fits else size)

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.per_node

    @property
    def link_classes(self) -> list[str]:
        """Over which these ranks send."""
        used = {"node": self.per_node > 1, "remote": self.num_nodes > 1}
        return [name for name in used if used[name]]

    @property
    def far_ranks(self) -> int:
        """On other nodes."""
        return self.num_ranks - self.per_node


def groups_touched(num_groups: int, *, num_experts: int, top_k: int) -> float:
    """D(g): expected distinct groups of experts among a token's K uniform choices."""
    elsewhere = num_experts - num_experts // num_groups
    return num_groups * (1 - comb(elsewhere, top_k) / comb(num_experts, top_k))


@dataclass(frozen=True)
class RowVolumes:
    """What one rank's tokens have for every single rank or node, its own among them: ``pairs``,
    (token, expert) pairs of a rank; ``rows``, (token, rank) pairs of a rank; ``node_rows``,
    (token, node) pairs of a node."""

    pairs: float
    rows: float
    node_rows: float

    @staticmethod
    def expected(
        layout: RankLayout, *, num_tokens: int, num_experts: int, top_k: int
    ) -> RowVolumes:
        """Under uniform routing. ValueError if the ranks do not divide the experts."""
        if num_experts % layout.num_ranks:
            raise ValueError(
                f"num_experts is {num_experts}; the {layout.num_ranks} ranks must divide it"
            )

        def rows(groups: int) -> float:
            touched = groups_touched(groups, num_experts=num_experts, top_k=top_k)
            return num_tokens * touched / groups

        return RowVolumes(
            pairs=num_tokens * top_k / layout.num_ranks,
            rows=rows(layout.num_ranks),
            node_rows=rows(layout.num_nodes),
        )

    def sent_rows(self, level: str) -> float:
        """For another rank, where no rank relays."""
        return self.pairs if level == "copies" else self.rows

    def times(self, load: float) -> RowVolumes:
        """Of a rank with ``load`` times as much of everything."""
        return RowVolumes(load * self.pairs, load * self.rows, load * self.node_rows)
