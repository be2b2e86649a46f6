"""How many bytes of rows must cross in one forward and backward: by the formulas of uniform routing
for the mean rank, and pair by pair from the routing for every rank. And what really left a host, as
its network interface counts it.

Rows go there and partial sums come back, forward and backward: what rank a sends to b on the way
there, b sends to a on the way back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distmoe.bench.dispatch.layer import Layer
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.row_volumes import RankLayout, RowVolumes

IntArray = NDArray[np.int64]
PASSES = 2


@dataclass(frozen=True)
class Interface:
    """A network interface, as Linux shows it to the host, or the namespace, of this process."""

    name: str

    def sent(self) -> int:
        """Bytes until now, headers and all."""
        counters = Path("/sys/class/net", self.name, "statistics")
        return int((counters / "tx_bytes").read_text())


def expected_rows(layout: RankLayout, level: str, *, shape: LayerShape) -> float:
    """Rows between nodes that the mean rank sends in one forward and backward of uniform routing:
    K (P - G) / P a token and direction for copies, D(P) (P - G) / P for rank, D(N) (N - 1) / N for
    node."""
    volumes = RowVolumes.expected(
        layout, num_tokens=shape.num_tokens, num_experts=shape.num_experts, top_k=shape.top_k
    )
    remote = {
        "copies": layout.far_ranks * volumes.pairs,
        "rank": layout.far_ranks * volumes.rows,
        "node": (layout.num_nodes - 1) * volumes.node_rows,
    }
    return 2 * PASSES * remote[level]


def gather_pairs(layer: Layer) -> IntArray:
    """[P, T, P]: how many experts of each rank the tokens of each rank have; collective."""
    routing, num_ranks = layer.routing, layer.exchange.size
    pairs_TP = routing.token_N.new_zeros(routing.num_tokens, num_ranks)
    owner_N = routing.expert_N.long() // (routing.num_experts // num_ranks)
    place = (routing.token_N.long(), owner_N)
    pairs_TP.index_put_(place, routing.token_N.new_ones(()), accumulate=True)
    gathered: IntArray = layer.exchange.all_gather(pairs_TP, kind="counts").long().numpy()
    return gathered


def hops(pairs_PTP: IntArray, layout: RankLayout, level: str) -> IntArray:
    """[P, P]: rows that every rank sends to every other on the way to the experts."""
    rows_PP: IntArray = (pairs_PTP if level == "copies" else pairs_PTP > 0).sum(1, dtype=np.int64)
    if level == "node":
        rows_PP = _relayed(pairs_PTP > 0, layout)
    np.fill_diagonal(rows_PP, 0)
    return rows_PP


def _relayed(needed_PTP: NDArray[np.bool_], layout: RankLayout) -> IntArray:
    """A row a node, to the rank of the own place there, which sends it on."""
    num_ranks, width = layout.num_ranks, layout.per_node
    hop_PP = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for source in range(num_ranks):
        home, place = divmod(source, width)
        for node in range(layout.num_nodes):
            inside = slice(node * width, (node + 1) * width)
            needed_TG = needed_PTP[source, :, inside]
            relay = source if node == home else node * width + place
            hop_PP[relay, inside] += needed_TG.sum(0)
            if node != home:
                hop_PP[source, relay] += needed_TG.any(1).sum()
    return hop_PP


def counted_bytes(
    hop_PP: IntArray, layout: RankLayout, rank: int, *, there: int, home: int
) -> tuple[int, int]:
    """Bytes of rows that ``rank`` sends in one forward and backward: in all, and to other nodes. A
    row has ``there`` bytes, the partial sum that comes back for it ``home``."""
    both_P = there * hop_PP[rank] + home * hop_PP[:, rank]
    elsewhere_P = np.arange(layout.num_ranks) // layout.per_node != rank // layout.per_node
    return PASSES * int(both_P.sum()), PASSES * int(both_P[elsewhere_P].sum())
