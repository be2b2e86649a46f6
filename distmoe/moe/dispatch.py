"""Makes the DispatchPlan of a layer: one small message, before any row travels."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange, exchange_now
from distmoe.comm.node_links import NodeLinks
from distmoe.moe.outgoing import OutgoingRows
from distmoe.moe.plan import DispatchPlan, Sizes, build_plan, plan_of_one_rank, slices_of
from distmoe.moe.schedule import Schedule
from distmoe.routing.rounding import owned_part
from distmoe.routing.routing import Routing


def plan_dispatch(
    routing: Routing,
    exchange: Exchange,
    *,
    tile: int,
    schedule: Schedule | None = None,
    links: NodeLinks | None = None,
    from_ranks_Pe: Tensor | None = None,
) -> DispatchPlan:
    """The plan of this rank; collective over the group of ``exchange``.

    To every other rank go 8 bytes a pair, row (int32) and score (fp32), under a head of 8 bytes a
    run with the number of its rows; experts follow from the counts. ``from_ranks_Pe``: pairs that
    every rank has for the experts of this one, as rounding tells; None: they are gathered first.
    ``links``: for schedules of level `node`; relays are told which rank needs which row, a byte
    each.
    """
    if exchange.size == 1:
        return plan_of_one_rank(routing)
    if from_ranks_Pe is None:
        counts_PE = exchange.all_gather(routing.counts_E.int(), kind="counts")
        from_ranks_Pe = owned_part(counts_PE, exchange)
    if from_ranks_Pe is None:
        raise AssertionError("the ranks must divide the experts")
    schedule = schedule or Schedule(steps=exchange.size - 1)
    outgoing = OutgoingRows.of(routing, schedule, exchange.rank, exchange.size)
    sizes = Sizes.of(outgoing, from_ranks_Pe)
    return build_plan(
        outgoing,
        sizes,
        schedule,
        rank=exchange.rank,
        num_tokens=routing.num_tokens,
        messages=_exchange_pairs(routing, outgoing, sizes, schedule, exchange),
        tile=tile,
        links=links,
    )


def _exchange_pairs(
    routing: Routing,
    outgoing: OutgoingRows,
    sizes: Sizes,
    schedule: Schedule,
    exchange: Exchange,
) -> dict[int, Tensor]:
    """The message of every rank with pairs for this one, or rows to pass on, see `build_plan`; and
    the own one."""
    rank, num_runs = exchange.rank, schedule.runs()
    pair_N2 = torch.stack(
        [outgoing.row_N, routing.score_N.detach().float().view(torch.int32)], dim=1
    )
    width = schedule.ranks_per_node
    # Rows that go through a rank are told to it, though none may be for its own experts.
    relays = {p for p in range(exchange.size) if width and (p - rank) % width == 0}
    passed_PC = outgoing.sent_PC if relays else torch.zeros_like(outgoing.sent_PC)
    head_PC2 = torch.stack([outgoing.rows_PC, passed_PC], dim=2)
    to = slices_of(sizes.pairs_to_P)
    message = {
        p: torch.cat([head_PC2[p], pair_N2[to[p]]])
        for p in range(exchange.size)
        if sizes.pairs_to_P[p] or p in relays or p == rank
    }
    received = {
        p: pair_N2.new_empty(num_runs + int(pairs), 2)
        for p, pairs in enumerate(sizes.pairs_from_P)
        if (pairs or p in relays) and p != rank
    }
    others = {p: m for p, m in message.items() if p != rank}
    exchange_now(exchange, "pairs", received, others)
    return received | {rank: message[rank]}
