"""Makes the DispatchPlan of a layer: one small message, before any row travels.

The host needs two answers of the device: how much to send, and how many rows arrive. Each is asked
for as soon as it is known and waited for one call later, so that whoever calls can enqueue other
work in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmoe.comm import Exchange, exchange_now
from distmoe.comm.node_links import NodeLinks
from distmoe.kernels.arrange_pairs import Messages
from distmoe.moe.arrivals import Arrangement
from distmoe.moe.host_copy import HostCopy, ints
from distmoe.moe.int_array import IntArray
from distmoe.moe.outgoing import OutgoingRows
from distmoe.moe.plan import DispatchPlan, Sizes, build_plan, plan_of_one_rank, sent_tokens
from distmoe.moe.row_formats import PackedRows
from distmoe.moe.schedule import Schedule
from distmoe.routing.rounding import owned_part
from distmoe.routing.routing import Routing


class Dispatch:
    """The plan of this rank in the making; collective over the group of ``exchange``.

    To every other rank go 8 bytes a pair, row (int32) and score (fp32), under a head of 8 bytes a
    run with the number of its rows; experts follow from the counts. ``from_ranks_Pe``: pairs that
    every rank has for the experts of this one, as rounding tells; None: they are gathered first.
    ``links``: for schedules of level `node`; relays are told which rank needs which row, a byte
    each.
    """

    def __init__(
        self,
        routing: Routing,
        exchange: Exchange,
        *,
        tile: int,
        schedule: Schedule | None = None,
        links: NodeLinks | None = None,
        from_ranks_Pe: Tensor | None = None,
    ) -> None:
        self._plan: DispatchPlan | None = None
        if exchange.size == 1:
            self._plan = plan_of_one_rank(routing)
            return
        self._routing, self._exchange, self._tile, self._links = routing, exchange, tile, links
        self._schedule = schedule or Schedule(steps=exchange.size - 1)
        if from_ranks_Pe is None:
            counts_PE = exchange.all_gather(routing.counts_E.int(), kind="counts")
            from_ranks_Pe = owned_part(counts_PE, exchange)
        if from_ranks_Pe is None:
            raise AssertionError("the ranks must divide the experts")
        self._outgoing = OutgoingRows.of(routing, self._schedule, exchange.rank, exchange.size)
        self._pair_N2 = torch.stack(
            [self._outgoing.row_N, routing.score_N.detach().float().view(torch.int32)], dim=1
        )
        self._from_ranks_Pe = from_ranks_Pe
        self._copy = HostCopy(self._outgoing.sent_PC, self._outgoing.pairs_P, from_ranks_Pe)
        # Behind the sizes, which the host waits for.
        self._relays = self._ranks_through_which_rows_go()
        self._head_PC2 = self._heads()

    def exchange_pairs(self) -> None:
        """Wait for the sizes, and tell every rank which pairs it gets."""
        if self._plan is not None:
            return
        sizes = self._sizes = Sizes(*self._copy.wait())
        rows, pairs = int(sizes.sent_PC_host.sum()), int(sizes.pairs_to_P_host.sum())
        self._outgoing = self._outgoing.first(rows=rows, pairs=pairs)
        self._pair_N2 = self._pair_N2[:pairs]
        exchange, schedule = self._exchange, self._schedule
        message_X2 = self._exchange_messages()
        messages = Messages(
            message_X2,
            self._from_ranks_Pe,
            ints(sizes.pairs_from_P_host),
            rank=exchange.rank,
            runs=schedule.runs(),
        )
        steps = schedule.blocks(exchange.rank, exchange.size)
        arrivals = [part for step in steps for part in step.receives]
        self._arrangement = Arrangement(messages, arrivals)
        # Behind the sizes, which the host waits for.
        self._sent_token_b = sent_tokens(steps, self._outgoing.token, sizes.sent_PC_host)

    @property
    def num_own_pairs(self) -> int:
        """N, of this rank's tokens, after `exchange_pairs`."""
        return len(self._pair_N2) if self._plan is None else self._plan.num_own_pairs

    def gather(self, source: PackedRows) -> list[Tensor] | None:
        """After `exchange_pairs`: the rows that leave, block by block; None if none do, or if there
        is nothing to wait for meanwhile."""
        if self._plan is not None:
            return None
        return [source.gather(token) for token in self._sent_token_b]

    def plan(self) -> DispatchPlan:
        """After `exchange_pairs`: wait for the rows that arrive; the same plan again for free."""
        if self._plan is None:
            self._plan = build_plan(
                self._outgoing,
                self._sizes,
                self._arrangement.finish(),
                self._schedule,
                sent_token_b=self._sent_token_b,
                rank=self._exchange.rank,
                num_tokens=self._routing.num_tokens,
                tile=self._tile,
                links=self._links,
            )
            # A decision that is kept for a replay keeps the plan, and nothing of its making.
            del self._routing, self._outgoing, self._pair_N2, self._from_ranks_Pe
            del self._copy, self._head_PC2, self._arrangement, self._sent_token_b
        return self._plan

    def _ranks_through_which_rows_go(self) -> set[int]:
        rank, width = self._exchange.rank, self._schedule.ranks_per_node
        return {p for p in range(self._exchange.size) if width and (p - rank) % width == 0}

    def _heads(self) -> Tensor:
        """[P, C, 2]: see `Messages`."""
        rows_PC, sent_PC = self._outgoing.rows_PC, self._outgoing.sent_PC
        passed_PC = sent_PC if self._relays else torch.zeros_like(sent_PC)
        return torch.stack([rows_PC, passed_PC], dim=2)

    def _exchange_messages(self) -> Tensor:
        """What all ranks have for this one, see `Messages`. Messages lie one after the other in
        one tensor each way, so that the work of the host does not grow with the ranks."""
        exchange, sizes = self._exchange, self._sizes
        rank, num_runs, heads = exchange.rank, self._schedule.runs(), self._head_PC2.unbind()
        pairs = torch.split(self._pair_N2, ints(sizes.pairs_to_P_host))
        in_turn = [part for both in zip(heads, pairs, strict=True) for part in both]
        sent = torch.split(torch.cat(in_turn), ints(num_runs + sizes.pairs_to_P_host))
        lengths = ints(num_runs + sizes.pairs_from_P_host)
        # Zeros: the heads of those who send nothing.
        received_X2 = self._pair_N2.new_zeros(sum(lengths), 2)
        received = torch.split(received_X2, lengths)
        received[rank].copy_(sent[rank])

        def with_peers(parts: Sequence[Tensor], pairs_P_host: IntArray) -> dict[int, Tensor]:
            # Rows that go through a rank are told to it, though none may be for its own experts.
            wanted = {p for p, pairs in enumerate(ints(pairs_P_host)) if pairs} | self._relays
            return {p: parts[p] for p in sorted(wanted - {rank})}

        exchange_now(
            exchange,
            "pairs",
            with_peers(received, sizes.pairs_from_P_host),
            with_peers(sent, sizes.pairs_to_P_host),
        )
        return received_X2


def plan_dispatch(
    routing: Routing,
    exchange: Exchange,
    *,
    tile: int,
    schedule: Schedule | None = None,
    links: NodeLinks | None = None,
    from_ranks_Pe: Tensor | None = None,
) -> DispatchPlan:
    """`Dispatch` with nothing to do in between."""
    dispatch = Dispatch(
        routing,
        exchange,
        tile=tile,
        schedule=schedule,
        links=links,
        from_ranks_Pe=from_ranks_Pe,
    )
    dispatch.exchange_pairs()
    return dispatch.plan()
