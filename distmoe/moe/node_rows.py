"""The rows of one pass over nodes: along the rail, fanned out in the node, gathered, and home.

The contract of `rows.FlatRows`. A block of another node's rows takes four transfers: rows of the
rail arrive at this rank, which passes them on to its node while it gets its own rows from all
relays; partial sums go back to the relays, which add them up and send one row a token home.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.comm import Exchange, Transfer, not_empty
from distmoe.comm.node_links import NodeLinks
from distmoe.moe.plan import Block, DispatchPlan
from distmoe.moe.relay import Duty
from distmoe.moe.rows import FlatRows


class NodeRows:
    """``near``: the blocks of the own node's ranks, which need no relay."""

    def __init__(
        self,
        plan: DispatchPlan,
        exchange: Exchange,
        links: NodeLinks,
        source_TH: Tensor,
        *,
        overlap: bool,
    ) -> None:
        self.plan, self.links, self.overlap = plan, links, overlap
        self.far = {i: block for i, block in enumerate(plan.blocks) if block.duty is not None}
        self.passing = {
            i: source_TH.new_empty(duty_of(block).num_rows, source_TH.shape[1])
            for i, block in self.far.items()
        }
        self.rail_there: dict[int, Transfer] = {}
        for i, block in self.far.items():
            received = not_empty({duty_of(block).source: self.passing[i]})
            self.rail_there[i] = links.rail.post_recv("rows", received)
        # Posted at once: the farthest rows take the longest.
        for i, block in self.far.items():
            rows = {self._node(p): source_TH[plan.token[r]] for p, r in block.sends.items()}
            self._send(links.rail, self.rail_there[i], rows)
        self.near = FlatRows(plan, exchange, source_TH, overlap=overlap)
        self.rows_RH, self.home_UH = self.near.rows_RH, self.near.home_UH
        self.fan = {
            i: links.fan.post_recv("rows", self._from_relays(block, self.rows_RH))
            for i, block in self.far.items()
        }
        self.parts = {
            i: [self.passing[i].new_empty(len(place), source_TH.shape[1]) for place in d.to_G]
            for i, d in ((i, duty_of(block)) for i, block in self.far.items())
        }
        self.gather = {
            i: links.gather.post_recv("rows", self._others(dict(enumerate(parts))))
            for i, parts in self.parts.items()
        }
        self.rail_home = {
            i: links.rail.post_recv(
                "rows",
                not_empty({self._node(p): self.home_UH[r] for p, r in block.sends.items()}),
            )
            for i, block in self.far.items()
        }
        self._unsettled = list(self.far)
        if not overlap:
            # All before the first wait for partial sums: a peer may need these rows to send its.
            for i in self.far:
                self._pass_on(i)

    @property
    def _width(self) -> int:
        return self.links.fan.size

    def _node(self, rank: int) -> int:
        return rank // self._width

    def _others(self, parts: dict[int, Tensor]) -> dict[int, Tensor]:
        """Of the other ranks of this node, if there is anything."""
        return not_empty({g: part for g, part in parts.items() if g != self.links.fan.rank})

    def _from_relays(self, block: Block, v_RH: Tensor) -> dict[int, Tensor]:
        """The rows of a block by the relay that passes them on."""
        return self._others({p % self._width: v_RH[rows] for p, rows in block.receives.items()})

    def _own_rows(self, block: Block) -> slice:
        """Those of the tokens whose relay is this rank."""
        return block.receives[duty_of(block).source * self._width + self.links.fan.rank]

    def _send(self, exchange: Exchange, transfer: Transfer, parts: dict[int, Tensor]) -> None:
        exchange.post_send(transfer, not_empty(parts))
        if not self.overlap:
            exchange.wait_recv(transfer)
            exchange.wait_send(transfer)

    def wait_for(self, i: int) -> None:
        """Block until the rows of block ``i`` are here; pass on what this rank has for others."""
        if i in self.far and self.overlap:
            self._pass_on(i)
        # Only what every rank of the node has sent before it came here: nobody waits in a circle.
        self._settle(before=i)
        if i in self.far:
            self.links.fan.wait_recv(self.fan[i])
        self.near.wait_for(i)

    def _pass_on(self, i: int) -> None:
        links, block, passing = self.links, self.far[i], self.passing[i]
        links.rail.wait_recv(self.rail_there[i])
        parts = {g: passing[place] for g, place in enumerate(duty_of(block).to_G)}
        self.rows_RH[self._own_rows(block)] = parts[links.fan.rank]
        self._send(links.fan, self.fan[i], self._others(parts))

    def send_home(self, i: int, y_RH: Tensor) -> None:
        """Send the partial sums of block ``i`` towards the ranks that own its tokens."""
        if i not in self.far:
            self.near.send_home(i, y_RH)
            return
        block = self.far[i]
        self.parts[i][self.links.fan.rank].copy_(y_RH[self._own_rows(block)])
        # Never waited for here: a peer may get to its part later, and `_settle` waits for it.
        parts = not_empty(self._from_relays(block, y_RH))
        self.links.gather.post_send(self.gather[i], parts)

    def _settle(self, *, before: int) -> None:
        """Add up what the node computed for the rows that this rank relays, and send it home."""
        while self._unsettled and self.far[self._unsettled[0]].gathered < before:
            i = self._unsettled.pop(0)
            duty = duty_of(self.far[i])
            self.links.gather.wait_recv(self.gather[i])
            sum_UH = torch.zeros_like(self.passing[i], dtype=torch.float32)
            for place, part in zip(duty.to_G, self.parts[i], strict=True):
                # The rows of one rank are distinct, so this adds in a fixed order on any device.
                sum_UH.index_add_(0, place, part.float())
            home = {duty.source: sum_UH.to(self.passing[i].dtype)}
            self._send(self.links.rail, self.rail_home[i], home)

    def send_rest(self) -> None:
        """Send home what other ranks of the node have finished with the last block only."""
        self._settle(before=len(self.plan.blocks))

    def finish(self, y_RH: Tensor) -> None:
        """Until everything is home, in ``home_UH``, and nothing is in flight."""
        self.send_rest()
        for i in self.far:
            self.links.rail.wait_recv(self.rail_home[i])
        for i in self.far:
            self.links.rail.wait_send(self.rail_there[i])
            self.links.fan.wait_send(self.fan[i])
            self.links.gather.wait_send(self.gather[i])
            self.links.rail.wait_send(self.rail_home[i])
        self.near.finish(y_RH)


def duty_of(block: Block) -> Duty:
    """Of a block that is known to have one."""
    if block.duty is None:
        raise AssertionError("rows of the own node are not passed on")
    return block.duty
