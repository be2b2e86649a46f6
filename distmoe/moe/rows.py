"""The rows of one pass on their way: to the experts, and the partial sums back."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distmoe.comm import Exchange, Transfer, not_empty
from distmoe.moe.plan import Block, DispatchPlan
from distmoe.moe.row_formats import PackedRows


class Rows(Protocol):
    """One way to move them. ``rows_RH``: what arrives, and the own rows, unpacked; ``home_UH``: the
    partial sums of the rows that this rank's tokens have everywhere, in the plan's order."""

    rows_RH: Tensor
    home_UH: Tensor

    def wait_for(self, i: int) -> None:
        """Block until the rows of block ``i`` are here."""
        ...

    def send_home(self, i: int, y_RH: Tensor) -> None:
        """Send the partial sums of block ``i`` to the ranks that own its tokens."""
        ...

    def send_rest(self) -> None:
        """After the last block: send what was still to be passed on, so that work which needs no
        rows hides its way."""
        ...

    def finish(self, y_RH: Tensor) -> None:
        """Until ``home_UH`` is complete and nothing is in flight."""
        ...


class OwnRows:
    """One rank: the rows are the tokens, rounded as rows that travel are."""

    def __init__(self, source: PackedRows) -> None:
        self.rows_RH = self.home_UH = source.unpacked()

    def wait_for(self, i: int) -> None:
        """Nothing is on its way."""

    def send_home(self, i: int, y_RH: Tensor) -> None:
        """They are at home."""

    def send_rest(self) -> None:
        """Nothing was sent."""

    def finish(self, y_RH: Tensor) -> None:
        """Nothing was sent."""


class FlatRows:
    """Straight to every rank, in one transfer a block and direction; blocks whose rows are passed
    on inside a node are somebody else's. ``gathered``: see `gathered_rows`. ``packed_RW``: what
    arrives, which is ``rows_RH`` itself if there is nothing to unpack."""

    def __init__(
        self,
        plan: DispatchPlan,
        exchange: Exchange,
        source: PackedRows,
        gathered: list[Tensor] | None = None,
        *,
        overlap: bool,
    ) -> None:
        self.plan, self.exchange, self.overlap = plan, exchange, overlap
        self.rows_RH = source.new_rows(plan.num_rows)
        self.packed_RW = self.rows_RH if source.is_plain else source.new_packed(plan.num_rows)
        self.home_UH = source.new_sums(plan.num_outgoing)
        self._format = source.format
        blocks = {i: b for i, b in enumerate(plan.blocks) if b.travels and b.duty is None}
        self.there = {i: self._receive(by_rank(self.packed_RW, b)) for i, b in blocks.items()}
        self.back = {
            i: self._receive({p: self.home_UH[rows] for p, rows in b.sends.items()})
            for i, b in blocks.items()
        }
        for i, block in blocks.items():
            rows = gathered_rows(source, plan, i, gathered)
            sent = torch.split(rows, lengths(block.sends))
            self._send(self.there[i], dict(zip(block.sends, sent, strict=True)))
        self._place_own(source)

    def _receive(self, parts: dict[int, Tensor]) -> Transfer:
        return self.exchange.post_recv("rows", not_empty(parts))

    def _send(self, transfer: Transfer, parts: dict[int, Tensor]) -> None:
        self.exchange.post_send(transfer, not_empty(parts))
        if not self.overlap:
            self.exchange.wait_recv(transfer)
            self.exchange.wait_send(transfer)

    def _place_own(self, source: PackedRows) -> None:
        own = self.plan.token[self.plan.rows_to[self.plan.rank]]
        done = 0
        for block in self.plan.blocks:
            if not block.travels:
                count = block.rows.stop - block.rows.start
                source.place(own[done : done + count], self.rows_RH[block.rows])
                done += count

    def wait_for(self, i: int) -> None:
        if i in self.there:
            self.exchange.wait_recv(self.there[i])
            self.unpack(self.plan.blocks[i])

    def unpack(self, block: Block) -> None:
        """The rows of a block that is here."""
        if self.packed_RW is not self.rows_RH:
            self._format.unpack(self.packed_RW[block.rows], self.rows_RH[block.rows])

    def send_home(self, i: int, y_RH: Tensor) -> None:
        if i in self.back:
            self._send(self.back[i], by_rank(y_RH, self.plan.blocks[i]))

    def send_rest(self) -> None:
        """Every block has gone home by itself."""

    def finish(self, y_RH: Tensor) -> None:
        for transfer in self.back.values():
            self.exchange.wait_recv(transfer)
        for transfer in (*self.there.values(), *self.back.values()):
            self.exchange.wait_send(transfer)
        own = [y_RH[block.rows] for block in self.plan.blocks if not block.travels]
        torch.cat(own, out=self.home_UH[self.plan.rows_to[self.plan.rank]])


def gathered_rows(
    source: PackedRows, plan: DispatchPlan, i: int, gathered: list[Tensor] | None
) -> Tensor:
    """The rows that leave in block ``i``: one gather, however many ranks they are for, if
    ``gathered``, block by block, does not have them already. While they leave, the next are
    gathered."""
    if gathered is not None:
        return gathered[i]
    return source.gather(plan.blocks[i].sent_token)


def by_rank(v_RH: Tensor, block: Block) -> dict[int, Tensor]:
    """The rows of ``block`` by the rank that owns their tokens, cut at once: a slice for each
    would cost the host twice as much."""
    parts = torch.split(v_RH[block.rows], lengths(block.receives))
    return dict(zip(block.receives, parts, strict=True))


def lengths(parts: dict[int, slice]) -> list[int]:
    """Rows of every part."""
    return [part.stop - part.start for part in parts.values()]
