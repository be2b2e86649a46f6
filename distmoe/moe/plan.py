"""DispatchPlan: every index and size of one layer and step, forward and backward. Pure data.

Two halves meet here. `OutgoingRows` is what the tokens of this rank send. `DispatchPlan` adds what
arrives: blocks of rows in the order of work (`schedule`), the pairs of those rows sorted by expert,
and the tiles that are complete after each block. See docs/design.md, "Order of work" and
"Tile-carry".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.comm.node_links import NodeLinks
from distmoe.kernels.moe_mlp import PairIndex, Runs, RunsOfBlocks
from distmoe.moe.arrivals import Arrived, ByRow
from distmoe.moe.carry import carry_tiles
from distmoe.moe.host_copy import HostCopy, ints, to_device
from distmoe.moe.int_array import IntArray
from distmoe.moe.outgoing import OutgoingRows
from distmoe.moe.relay import Duty, duties, exchange_needs
from distmoe.moe.schedule import Schedule, Step
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class Sizes:
    """What this rank sends and receives, on the host: rows of every run that it sends itself
    ``sent_PC_host``, ``pairs_to_P_host``, and pairs by source and local expert ``from_Pe_host``."""

    sent_PC_host: IntArray
    pairs_to_P_host: IntArray
    from_Pe_host: IntArray

    @property
    def pairs_from_P_host(self) -> IntArray:
        """Pairs that every rank has for this one."""
        total_P_host: IntArray = self.from_Pe_host.sum(1)
        return total_P_host


@dataclass(frozen=True)
class Block:
    """Consecutive ``rows`` of x_RH that arrive together.

    ``receives``: rank that owns the tokens -> its rows in x_RH. ``sends``: rank -> the rows of this
    rank's tokens, places in ``token``, that leave in the same transfer and whose partial sums come
    back for them. Empty for rows of the own tokens. ``sent_token``: int64, tokens of those rows,
    rank by rank. ``runs``: tiles that are complete once this block is here. ``ready``: blocks whose
    rows are all computed after those tiles. ``duty``: what this rank passes on to the others of its
    node in a block of another node's rows, and ``gathered`` the block after which all of them have
    sent their partial sums of it.
    """

    rows: slice
    receives: dict[int, slice]
    sends: dict[int, slice]
    sent_token: Tensor
    runs: Runs
    ready: list[int]
    duty: Duty | None = None
    gathered: int = 0

    @property
    def travels(self) -> bool:
        """Whether its rows are other ranks'. Every rank has such blocks in the same places."""
        return bool(self.sends)


@dataclass(frozen=True)
class DispatchPlan:
    """All indices of one layer and step.

    ``token``: int64 [U], the token of every row that this rank sends to the ranks, itself included,
    rank by rank (``rows_to``); empty with one rank, whose rows are the tokens themselves.
    ``pairs_to``: this rank's pairs by rank, ``pairs_from``: the pairs computed here by rank that
    owns their tokens, both as slices; ``place_L``: where each of the latter lies in expert order
    (None with one rank).
    """

    rank: int
    num_ranks: int
    num_tokens: int
    token: Tensor
    rows_to: list[slice]
    pairs_to: list[slice]
    pairs_from: list[slice]
    place_L: Tensor | None
    blocks: list[Block]
    index: PairIndex
    score_L: Tensor

    @cached_property
    def combine(self) -> PairIndex | None:
        """The rows of every token, in rank order; None with one rank. Made when it is first asked
        for: the experts do not need it."""
        if self.num_ranks == 1:
            return None
        token_U = self.token.int()
        by_token = ByRow(token_U)
        offsets_T1 = by_token.offsets(num_rows=self.num_tokens)
        whole = torch.stack([offsets_T1[0], offsets_T1[-1]])
        return PairIndex(token_U, whole, by_token.by_row_L, offsets_T1)

    @property
    def num_rows(self) -> int:
        return self.index.num_rows

    @property
    def num_pairs(self) -> int:
        return self.index.row_L.numel()

    @property
    def num_own_pairs(self) -> int:
        """N, of this rank's tokens."""
        return int(self.pairs_to[-1].stop)

    @property
    def num_outgoing(self) -> int:
        """U."""
        return int(self.token.numel())

    def rows_sent(self) -> int:
        """Rows that leave this rank in one direction."""
        return sum(s.stop - s.start for p, s in enumerate(self.rows_to) if p != self.rank)

    def copies_sent(self) -> int:
        """Rows that would leave this rank if every pair carried its own copy."""
        return sum(s.stop - s.start for p, s in enumerate(self.pairs_to) if p != self.rank)


def plan_of_one_rank(routing: Routing) -> DispatchPlan:
    """P = 1: rows are the tokens, nothing travels, and nothing is asked of the device, so the
    arrays keep the tail that ``routing`` may have behind its last pair."""
    num_pairs = len(routing.token_N)
    index = PairIndex(
        row_L=routing.token_N,
        offsets_e1=F.pad(routing.counts_E.cumsum(0, dtype=torch.int32), (1, 0)),
        by_row_L=routing.by_token_N,
        row_offsets_R1=routing.token_offsets_T1,
    )
    rows, none = slice(0, routing.num_tokens), routing.token_N[:0]
    return DispatchPlan(
        rank=0,
        num_ranks=1,
        num_tokens=routing.num_tokens,
        token=none,
        rows_to=[slice(0, 0)],
        pairs_to=[slice(0, num_pairs)],
        pairs_from=[slice(0, num_pairs)],
        place_L=None,
        blocks=[Block(rows, {0: rows}, {}, none, runs=Runs.of_all(index), ready=[0])],
        index=index,
        score_L=routing.score_N.detach(),
    )


def slices_of(counts: IntArray) -> list[slice]:
    """Consecutive slices of the given lengths."""
    ends = ints(np.cumsum(counts))
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def sent_tokens(steps: list[Step], token: Tensor, sent_PC_host: IntArray) -> list[Tensor]:
    """Of every block the tokens of the rows that this rank sends, rank by rank: next to each other,
    for one gather of all that leaves together."""
    every = []
    for step in steps:
        rows = _sent_rows(step, sent_PC_host).values()
        parts = [token[part] for part in rows] or [token[:0]]
        every.append(parts[0] if len(parts) == 1 else torch.cat(parts))
    return every


def _sent_rows(step: Step, sent_PC_host: IntArray) -> dict[int, slice]:
    """Where the rows that this rank sends in ``step`` lie, by rank."""
    first_PC_host = sent_PC_host.cumsum().reshape(sent_PC_host.shape) - sent_PC_host
    rows = {}
    for part in step.sends:
        begin = int(first_PC_host[part.rank, part.run])
        rows[part.rank] = slice(begin, begin + int(sent_PC_host[part.rank, part.run]))
    return rows


def build_plan(
    outgoing: OutgoingRows,
    sizes: Sizes,
    arrived: Arrived,
    schedule: Schedule,
    *,
    sent_token_b: list[Tensor],
    rank: int,
    num_tokens: int,
    tile: int,
    links: NodeLinks | None = None,
) -> DispatchPlan:
    """The plan of ``rank`` among two or more. ``sent_token_b``: see `sent_tokens`. ``tile``: M.
    ``links``: where rows are passed on; what to pass on, and when partial sums are ready, is
    exchanged then, and waited for.
    """
    num_ranks = len(sizes.from_Pe_host)
    steps = schedule.blocks(rank, num_ranks)
    rows_to = slices_of(sizes.sent_PC_host.sum(1))
    duty_of: dict[tuple[int, int], Duty] = {}
    if links is not None and outgoing.relay_UG is not None:
        width = schedule.ranks_per_node
        relayed_QC_host = arrived.relayed_PC_host[rank % width :: width]
        needed = exchange_needs(
            outgoing.relay_UG, rows_to, relayed_QC_host, links.rail, place=rank % width
        )
        duty_of = duties(needed, relayed_QC_host, width=width)
    return DispatchPlan(
        rank=rank,
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        token=outgoing.token,
        rows_to=rows_to,
        pairs_to=slices_of(sizes.pairs_to_P_host),
        pairs_from=slices_of(sizes.pairs_from_P_host),
        place_L=arrived.place_L,
        blocks=_gathered(
            _blocks(steps, arrived, sent_token_b, sizes.sent_PC_host, duty_of, tile), links
        ),
        index=arrived.index,
        score_L=arrived.score_L,
    )


def _blocks(
    steps: list[Step],
    arrived: Arrived,
    sent_token_b: list[Tensor],
    sent_PC_host: IntArray,
    duty_of: dict[tuple[int, int], Duty],
    tile: int,
) -> list[Block]:
    first_b = np.cumsum([0, *(len(step.receives) for step in steps[:-1])])
    counts_be = np.add.reduceat(arrived.counts_Ae_host, first_b, axis=0)
    bounds_b2e, ready = carry_tiles(counts_be, tile)
    runs = _runs_on_device(bounds_b2e, arrived.place_L.device)
    rows_of = slices_of(arrived.rows_A_host)
    blocks = []
    for i, (step, first) in enumerate(zip(steps, ints(first_b), strict=True)):
        received = rows_of[first : first + len(step.receives)]
        receives = {part.rank: rows for part, rows in zip(step.receives, received, strict=True)}
        sends = _sent_rows(step, sent_PC_host)
        rows = slice(received[0].start, received[-1].stop)
        duty = None
        if step.relayed:
            duty = duty_of[step.receives[0].rank // len(step.receives), step.receives[0].run]
        sent = sent_token_b[i]
        blocks.append(Block(rows, receives, sends, sent, runs=runs[i], ready=ready[i], duty=duty))
    return blocks


def _gathered(blocks: list[Block], links: NodeLinks | None) -> list[Block]:
    """With the block after which the slowest rank of the node has finished each."""
    if links is None:
        return blocks
    finished = [next(i for i, b in enumerate(blocks) if j in b.ready) for j in range(len(blocks))]
    own = to_device(np.array(finished, dtype=np.int32), blocks[0].runs.bounds_2e.device)
    (last,) = HostCopy(links.gather.all_gather(own, kind="ready").amax(0)).wait()
    return [replace(block, gathered=after) for block, after in zip(blocks, ints(last), strict=True)]


def _runs_on_device(bounds_b2e: IntArray, device: torch.device) -> list[Runs]:
    """One copy to the device for the ranges of all blocks."""
    pairs_b = ints((bounds_b2e[:, 1] - bounds_b2e[:, 0]).sum(1))
    return RunsOfBlocks(to_device(bounds_b2e.astype(np.int32), device), pairs_b).each()
