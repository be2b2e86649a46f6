"""Rows that one rank sends in one direction: expected under uniform routing, or counted.

With D(g) = g (1 - C(E - E/g, K) / C(E, K)), the number of distinct groups out of g equal groups of
experts that a token's K experts touch, a token has K / P pairs for each rank, crosses to each rank
as D(P) / P rows if it travels once per rank, and to each of N nodes as D(N) / N rows if it travels
once per node (the formula of DeepEP's get_expected_topk).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


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

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.per_node


def groups_touched(num_groups: int, *, num_experts: int, top_k: int) -> float:
    """D(g): expected distinct groups of experts among a token's K uniform choices."""
    elsewhere = num_experts - num_experts // num_groups
    return num_groups * (1 - comb(elsewhere, top_k) / comb(num_experts, top_k))


@dataclass(frozen=True)
class RowVolumes:
    """What one rank's tokens have for every rank and node, itself included.

    ``pairs_NG``: (token, expert) pairs, ``rows_NG``: (token, rank) pairs. Row n is the node at
    distance n, column l the rank whose place in its node is l further: [0, 0] is the rank itself
    and column 0 its rail. ``node_rows_N``: (token, node) pairs.
    """

    pairs_NG: FloatArray
    rows_NG: FloatArray
    node_rows_N: FloatArray

    @staticmethod
    def expected(
        layout: RankLayout, *, num_tokens: int, num_experts: int, top_k: int
    ) -> RowVolumes:
        """Under uniform routing. ValueError if the ranks do not divide the experts."""
        if num_experts % layout.num_ranks:
            raise ValueError(
                f"num_experts is {num_experts}; the {layout.num_ranks} ranks must divide it"
            )
        shape = (layout.num_nodes, layout.per_node)
        per_rank = groups_touched(layout.num_ranks, num_experts=num_experts, top_k=top_k)
        per_node = groups_touched(layout.num_nodes, num_experts=num_experts, top_k=top_k)
        return RowVolumes(
            pairs_NG=np.full(shape, num_tokens * top_k / layout.num_ranks),
            rows_NG=np.full(shape, num_tokens * per_rank / layout.num_ranks),
            node_rows_N=np.full(layout.num_nodes, num_tokens * per_node / layout.num_nodes),
        )

    @staticmethod
    def counted(selected_TE: NDArray[np.bool_], layout: RankLayout, *, rank: int) -> RowVolumes:
        """From the experts that each token of ``rank`` was given; expert i belongs to rank
        i // (E / P)."""
        num_tokens, num_experts = selected_TE.shape
        N, G = layout.num_nodes, layout.per_node
        pairs_TNG = selected_TE.reshape(num_tokens, N, G, num_experts // (N * G)).sum(-1)
        # Node n and place l as seen from the rank: its own node and place come first.
        pairs_TNG = np.roll(pairs_TNG, (-(rank // G), -(rank % G)), axis=(1, 2))
        return RowVolumes(
            pairs_NG=pairs_TNG.sum(0).astype(np.float64),
            rows_NG=(pairs_TNG > 0).sum(0).astype(np.float64),
            node_rows_N=(pairs_TNG > 0).any(2).sum(0).astype(np.float64),
        )
