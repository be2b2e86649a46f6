"""Makes the DispatchPlan of a layer: two small messages, before any row travels."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange
from distmoe.moe.plan import (
    DispatchPlan,
    OutgoingRows,
    Sizes,
    build_plan,
    plan_of_one_rank,
    slices_of,
)
from distmoe.routing.routing import Routing


def plan_dispatch(routing: Routing, exchange: Exchange, *, tile: int) -> DispatchPlan:
    """The plan of this rank; collective over the group of ``exchange``.

    First an all-gather of counts per expert and unique rows per rank, [E + P] int32. Then, to
    every other rank, 8 bytes a pair: row (int32) and score (fp32); experts follow from the counts.
    """
    if exchange.size == 1:
        return plan_of_one_rank(routing)
    outgoing = OutgoingRows.of(routing, exchange.size)
    sizes = Sizes.of(exchange.all_gather(outgoing.sizes()), routing.num_experts)
    pairs_from = _exchange_pairs(routing, outgoing, sizes, exchange)
    return build_plan(
        outgoing,
        sizes,
        rank=exchange.rank,
        num_tokens=routing.num_tokens,
        pairs_from=pairs_from,
        tile=tile,
    )


def _exchange_pairs(
    routing: Routing, outgoing: OutgoingRows, sizes: Sizes, exchange: Exchange
) -> dict[int, tuple[Tensor, Tensor]]:
    rank, num_ranks = exchange.rank, exchange.size
    pairs_PP = sizes.counts_PE.reshape(num_ranks, num_ranks, -1).sum(2)
    message_N2 = torch.stack(
        [outgoing.row_N, routing.score_N.detach().float().view(torch.int32)], dim=1
    )
    to = slices_of(pairs_PP[rank])
    peers = [p for p in range(num_ranks) if p != rank]
    buffers = {
        p: message_N2.new_empty(int(pairs_PP[p, rank]), 2) for p in peers if pairs_PP[p, rank]
    }
    transfer = exchange.post_recv("pairs", buffers)
    exchange.post_send(transfer, {p: message_N2[to[p]] for p in peers if pairs_PP[rank, p]})
    exchange.wait_recv(transfer)
    exchange.wait_send(transfer)
    received = {p: buffers.get(p, message_N2[:0]) for p in peers} | {rank: message_N2[to[rank]]}
    return {p: (m[:, 0], m[:, 1].contiguous().view(torch.float32)) for p, m in received.items()}
