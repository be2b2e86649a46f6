"""The rows of one pass over nodes: along the rail, fanned out in the node, gathered, and home.

The contract of `rows.FlatRows`. A block of another node's rows takes four transfers: rows of the
rail arrive at this rank, which passes them on to its node while it gets its own rows from all
relays; partial sums go back to the relays, which add them up and send one row a token home.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.comm import Exchange, Transfer, not_empty
from distmoe.comm.node_links import NodeLinks
from distmoe.moe.plan import Block, DispatchPlan
from distmoe.moe.relay import Duty
from distmoe.moe.row_formats import PackedRows
from distmoe.moe.rows import FlatRows, gathered_rows


@dataclass(frozen=True)
class FarBlock:
    """A block of another node's rows, and its transfers in their order. ``passing_UW``: the rows
    that this rank relays, packed; ``part_UH``: partial sums of them, by rank of the node."""

    block: Block
    duty: Duty
    passing_UW: Tensor
    part_UH: list[Tensor]
    there: Transfer
    fan: Transfer
    gather: Transfer
    home: Transfer


class NodeRows:
    """``near``: the blocks of the own node's ranks, which need no relay."""

    def __init__(
        self,
        plan: DispatchPlan,
        exchange: Exchange,
        links: NodeLinks,
        source: PackedRows,
        gathered: list[Tensor] | None = None,
        *,
        overlap: bool,
    ) -> None:
        self.plan, self.links, self.overlap = plan, links, overlap
        # Posted at once: the farthest rows take the longest.
        on_the_rail = self._post_rail(source, gathered)
        self.near = FlatRows(plan, exchange, source, gathered, overlap=overlap)
        self.rows_RH, self.home_UH = self.near.rows_RH, self.near.home_UH
        self.far = {
            i: self._post(plan.blocks[i], *posted, source) for i, posted in on_the_rail.items()
        }
        self._unsettled = list(self.far)
        if not overlap:
            # All before the first wait for partial sums: a peer may need these rows to send its.
            for far in self.far.values():
                self._pass_on(far)

    def _post_rail(
        self, source: PackedRows, gathered: list[Tensor] | None
    ) -> dict[int, tuple[Duty, Tensor, Transfer]]:
        """By block: every receive, and then every send."""
        posted = {}
        for i, block in enumerate(self.plan.blocks):
            if block.duty is not None:
                passing_UW = source.new_packed(block.duty.num_rows)
                received = not_empty({block.duty.source: passing_UW})
                there = self.links.rail.post_recv("rows", received)
                posted[i] = block.duty, passing_UW, there
        for i, (_, _, there) in posted.items():
            # To one rank, the relay of the other node.
            (relay,) = self.plan.blocks[i].sends
            rows_UW = gathered_rows(source, self.plan, i, gathered)
            self._send(self.links.rail, there, {self._node(relay): rows_UW})
        return posted

    def _post(
        self, block: Block, duty: Duty, passing_UW: Tensor, there: Transfer, source: PackedRows
    ) -> FarBlock:
        """The receives of what follows."""
        links = self.links
        part_UH = [source.new_sums(len(place)) for place in duty.to_G]
        home = {self._node(p): self.home_UH[rows] for p, rows in block.sends.items()}
        return FarBlock(
            block,
            duty,
            passing_UW,
            part_UH,
            there,
            fan=links.fan.post_recv("rows", self._from_relays(block, self.near.packed_RW)),
            gather=links.gather.post_recv("rows", self._others(dict(enumerate(part_UH)))),
            home=links.rail.post_recv("rows", not_empty(home)),
        )

    @property
    def _width(self) -> int:
        return self.links.fan.size

    def _node(self, rank: int) -> int:
        return rank // self._width

    def _others(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """Of the other ranks of this node, if there is anything."""
        return not_empty({g: part for g, part in parts.items() if g != self.links.fan.rank})

    def _from_relays(self, block: Block, v_RW: Tensor) -> dict[int, Tensor]:
        """The rows of a block by the relay that passes them on."""
        return self._others({p % self._width: v_RW[rows] for p, rows in block.receives.items()})

    def _own_rows(self, far: FarBlock) -> slice:
        """Those of the tokens whose relay is this rank."""
        return far.block.receives[far.duty.source * self._width + self.links.fan.rank]

    def _send(self, exchange: Exchange, transfer: Transfer, parts: dict[int, Tensor]) -> None:
        exchange.post_send(transfer, not_empty(parts))
        if not self.overlap:
            exchange.wait_recv(transfer)
            exchange.wait_send(transfer)

    def wait_for(self, i: int) -> None:
        """Block until the rows of block ``i`` are here; pass on what this rank has for others."""
        far = self.far.get(i)
        if far is not None and self.overlap:
            self._pass_on(far)
        # Only what every rank of the node has sent before it came here: nobody waits in a circle.
        self._settle(before=i)
        if far is not None:
            self.links.fan.wait_recv(far.fan)
            self.near.unpack(far.block)
        self.near.wait_for(i)

    def _pass_on(self, far: FarBlock) -> None:
        links = self.links
        links.rail.wait_recv(far.there)
        parts = {g: far.passing_UW[place] for g, place in enumerate(far.duty.to_G)}
        self.near.packed_RW[self._own_rows(far)] = parts[links.fan.rank]
        self._send(links.fan, far.fan, self._others(parts))

    def send_home(self, i: int, y_RH: Tensor) -> None:
        """Send the partial sums of block ``i`` towards the ranks that own its tokens."""
        if i not in self.far:
            self.near.send_home(i, y_RH)
            return
        far = self.far[i]
        far.part_UH[self.links.fan.rank].copy_(y_RH[self._own_rows(far)])
        # Never waited for here: a peer may get to its part later, and `_settle` waits for it.
        self.links.gather.post_send(far.gather, not_empty(self._from_relays(far.block, y_RH)))

    def _settle(self, *, before: int) -> None:
        """Add up what the node computed for the rows that this rank relays, and send it home."""
        while self._unsettled and self.far[self._unsettled[0]].block.gathered < before:
            far = self.far[self._unsettled.pop(0)]
            self.links.gather.wait_recv(far.gather)
            sum_UH = self.home_UH.new_zeros(
                far.duty.num_rows, self.home_UH.shape[1], dtype=torch.float32
            )
            for place, part in zip(far.duty.to_G, far.part_UH, strict=True):
                # The rows of one rank are distinct, so this adds in a fixed order on any device.
                sum_UH.index_add_(0, place, part.float())
            home = {far.duty.source: sum_UH.to(self.home_UH.dtype)}
            self._send(self.links.rail, far.home, home)

    def send_rest(self) -> None:
        """Send home what other ranks of the node have finished with the last block only."""
        self._settle(before=len(self.plan.blocks))

    def finish(self, y_RH: Tensor) -> None:
        """Until everything is home, in ``home_UH``, and nothing is in flight."""
        self.send_rest()
        for far in self.far.values():
            self.links.rail.wait_recv(far.home)
        for far in self.far.values():
            self.links.rail.wait_send(far.there)
            self.links.fan.wait_send(far.fan)
            self.links.gather.wait_send(far.gather)
            self.links.rail.wait_send(far.home)
        self.near.finish(y_RH)
