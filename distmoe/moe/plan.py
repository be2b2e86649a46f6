"""DispatchPlan: every index and size of one layer and step, forward and backward. Pure data.

Two halves meet here. `OutgoingRows` is what the tokens of this rank send: each token once to every
rank that owns one of its experts. `DispatchPlan` adds what arrives: blocks of rows in the order of
work (first half of the own rows, then one block per peer, then the second half of the own rows),
the pairs of those rows sorted by expert, and the tiles that are complete after each block.
See docs/design.md, "Order of work" and "Tile-carry".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, Runs
from distmoe.routing.routing import Routing

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class OutgoingRows:
    """Rows and pairs that this rank's tokens send, peer by peer (this rank included).

    ``token``: int64, unique tokens of peer 0, then of peer 1, ..., ascending inside a peer.
    ``row_N``: int32, place of a pair's token among the rows of its peer. ``unique_P``: int32,
    rows per peer. ``counts_E``: int32, pairs per expert.
    """

    token: Tensor
    row_N: Tensor
    unique_P: Tensor
    counts_E: Tensor

    @staticmethod
    def of(routing: Routing, num_ranks: int) -> OutgoingRows:
        """From the routing of this rank's tokens; expert i belongs to rank i // (E / P)."""
        num_local = routing.num_experts // num_ranks
        owner_N = routing.expert_N.long() // num_local
        token_N = routing.token_N.long()
        used_PT = torch.zeros(
            num_ranks, routing.num_tokens, dtype=torch.bool, device=token_N.device
        )
        used_PT[owner_N, token_N] = True
        place_PT = used_PT.cumsum(1, dtype=torch.int32) - 1
        return OutgoingRows(
            token=used_PT.nonzero()[:, 1],
            row_N=place_PT[owner_N, token_N],
            unique_P=used_PT.sum(1, dtype=torch.int32),
            counts_E=routing.counts_E,
        )


@dataclass(frozen=True)
class Sizes:
    """What this rank sends and receives, on the host: ``pairs_to_P``, ``rows_to_P``, and pairs by
    source and local expert ``from_Pe``."""

    pairs_to_P: IntArray
    rows_to_P: IntArray
    from_Pe: IntArray

    @property
    def pairs_from_P(self) -> IntArray:
        """Pairs that every rank has for this one."""
        total_P: IntArray = self.from_Pe.sum(1)
        return total_P

    @staticmethod
    def of(outgoing: OutgoingRows, from_ranks_Pe: Tensor) -> Sizes:
        """Waits for the device, once for all of them."""
        num_ranks, num_local = from_ranks_Pe.shape
        pairs_to_P = outgoing.counts_E.view(num_ranks, num_local).sum(1)
        parts = [pairs_to_P, outgoing.unique_P, from_ranks_Pe.reshape(-1)]
        host = torch.cat([part.long() for part in parts]).cpu().numpy()
        pairs_to, rows_to, received = np.split(host, [num_ranks, 2 * num_ranks])
        return Sizes(pairs_to, rows_to, received.reshape(num_ranks, num_local))


@dataclass(frozen=True)
class Block:
    """Consecutive ``rows`` of x_RH that arrive together.

    ``source`` is the rank that owns their tokens. ``pairs_in_source``: where the block's pairs lie
    among the pairs that the source sends here (None: they are all of them). ``pairs_in_L``: their
    places in expert order (None with one rank, whose pairs are in that order already). ``runs``:
    tiles that are complete once this block is here. ``ready``: blocks whose rows are all computed
    after those tiles.
    """

    source: int
    rows: slice
    pairs_in_source: Tensor | None
    pairs_in_L: Tensor | None
    runs: Runs
    ready: list[int]


@dataclass(frozen=True)
class DispatchPlan:
    """All indices of one layer and step. ``rows_to``/``pairs_to`` are slices by peer; with one
    rank, rows are the tokens themselves and ``token`` is empty."""

    rank: int
    num_ranks: int
    num_tokens: int
    token: Tensor
    rows_to: list[slice]
    pairs_to: list[slice]
    blocks: list[Block]
    index: PairIndex
    score_L: Tensor

    @property
    def num_rows(self) -> int:
        return self.index.num_rows

    @property
    def num_pairs(self) -> int:
        return self.index.row_L.numel()

    def tokens_to(self, peer: int) -> Tensor:
        """int64 ids of the tokens whose rows go to ``peer``, ascending."""
        return self.token[self.rows_to[peer]]

    def rows_sent(self) -> int:
        """Rows that leave this rank in one direction, each token once per other rank."""
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
    block = Block(
        source=0,
        rows=slice(0, routing.num_tokens),
        pairs_in_source=None,
        pairs_in_L=None,
        runs=Runs.of_all(index),
        ready=[0],
    )
    return DispatchPlan(
        rank=0,
        num_ranks=1,
        num_tokens=routing.num_tokens,
        token=routing.token_N[:0],
        rows_to=[slice(0, 0)],
        pairs_to=[slice(0, num_pairs)],
        blocks=[block],
        index=index,
        score_L=routing.score_N.detach(),
    )


def slices_of(counts: IntArray) -> list[slice]:
    """Consecutive slices of the given lengths."""
    ends = np.cumsum(counts).tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


@dataclass(frozen=True)
class _Arrival:
    """A block before it has its place: rows, and pairs (row in block, score) sorted by expert."""

    source: int
    num_rows: int
    counts_e: IntArray
    row: Tensor
    score: Tensor
    pairs_in_source: Tensor | None = None


def build_plan(
    outgoing: OutgoingRows,
    sizes: Sizes,
    *,
    rank: int,
    num_tokens: int,
    pairs_from: dict[int, Tensor],
    tile: int,
) -> DispatchPlan:
    """The plan of ``rank`` among two or more. ``pairs_from[source]``: int32 [1 + pairs, 2] of the
    pairs that the source sends here, its number of rows, then row and bits of the fp32 score of
    each, sorted by (expert, token); the own pairs among them. ``tile``: M."""
    arrivals = _arrivals(sizes, rank, pairs_from, outgoing.row_N.new_empty(0, 2))
    counts_be = np.stack([arrival.counts_e for arrival in arrivals])
    bounds_b2e, ready = carry_tiles(counts_be, tile)
    runs = _runs_on_device(bounds_b2e, outgoing.token.device)
    row_ends = np.cumsum([arrival.num_rows for arrival in arrivals])
    pair_ends = np.cumsum(counts_be.sum(1))
    index, score_L, place_L = _sort_by_expert(arrivals, row_ends)
    blocks = []
    for i, arrival in enumerate(arrivals):
        row_begin, pair_begin = row_ends[i] - arrival.num_rows, pair_ends[i] - len(arrival.row)
        blocks.append(
            Block(
                source=arrival.source,
                rows=slice(int(row_begin), int(row_ends[i])),
                pairs_in_source=arrival.pairs_in_source,
                pairs_in_L=place_L[int(pair_begin) : int(pair_ends[i])],
                runs=runs[i],
                ready=ready[i],
            )
        )
    return DispatchPlan(
        rank=rank,
        num_ranks=len(sizes.from_Pe),
        num_tokens=num_tokens,
        token=outgoing.token,
        rows_to=slices_of(sizes.rows_to_P),
        pairs_to=slices_of(sizes.pairs_to_P),
        blocks=blocks,
        index=index,
        score_L=score_L,
    )


def _arrivals(
    sizes: Sizes, rank: int, pairs_from: dict[int, Tensor], no_pairs: Tensor
) -> list[_Arrival]:
    """Blocks in the order of work: half of the own rows, peers by distance, the other half."""
    num_ranks = len(sizes.from_Pe)
    peers = [(rank - distance) % num_ranks for distance in range(1, num_ranks)]
    rows_from = _rows_from([pairs_from.get(p) for p in peers])
    blocks = []
    for source, num_rows in zip(peers, rows_from, strict=True):
        row, score = _row_and_score(pairs_from.get(source, no_pairs))
        blocks.append(_Arrival(source, num_rows, sizes.from_Pe[source], row, score))
    first, second = _own_halves(sizes, rank, pairs_from.get(rank, no_pairs))
    return [first, *blocks, second]


def _own_halves(sizes: Sizes, rank: int, own_pairs: Tensor) -> list[_Arrival]:
    own_rows, own_counts = int(sizes.rows_to_P[rank]), sizes.from_Pe[rank]
    row, score = _row_and_score(own_pairs)
    first_rows = own_rows - own_rows // 2
    expert = torch.from_numpy(np.repeat(np.arange(len(own_counts)), own_counts)).to(row.device)
    halves = []
    for low, high in ((0, first_rows), (first_rows, own_rows)):
        pair = ((row >= low) & (row < high)).nonzero().flatten()
        counts = torch.bincount(expert[pair], minlength=len(own_counts)).cpu().numpy()
        halves.append(_Arrival(rank, high - low, counts, row[pair] - low, score[pair], pair))
    return halves


def _rows_from(messages: list[Tensor | None]) -> list[int]:
    """The numbers of rows in the heads of the messages, in one wait for the device."""
    heads = [message[0, 0] for message in messages if message is not None]
    numbers = iter(torch.stack(heads).tolist() if heads else [])
    return [0 if message is None else next(numbers) for message in messages]


def _row_and_score(message: Tensor) -> tuple[Tensor, Tensor]:
    return message[1:, 0], message[1:, 1].contiguous().view(torch.float32)


def carry_tiles(counts_be: IntArray, tile: int) -> tuple[IntArray, list[list[int]]]:
    """Which pairs run after each block, [blocks, 2, e] first pair and pair after the last one of
    each expert, and which blocks are finished then.

    ``counts_be[b, i]``: pairs of local expert i in block b. An expert's pairs lie in order of
    arrival. After block b it has run its whole tiles, and its ragged rest only if no pair is
    missing, so cutting the work into blocks adds no tile. A block is finished when the tile of
    the last pair of each of its experts has run; blocks finish in order.
    """
    arrived_be = counts_be.cumsum(0)
    total_e = arrived_be[-1]
    done_be = np.where(arrived_be == total_e, total_e, arrived_be // tile * tile)
    offset_e = np.concatenate([[0], total_e.cumsum()[:-1]])
    before_be = np.concatenate([np.zeros_like(done_be[:1]), done_be[:-1]])
    ready: list[list[int]] = []
    finished = 0
    for arrived, done_e in enumerate(done_be, start=1):
        now: list[int] = []
        while finished < arrived:
            needed_e = np.where(counts_be[finished] > 0, arrived_be[finished], 0)
            if (done_e < needed_e).any():
                break
            now.append(finished)
            finished += 1
        ready.append(now)
    return np.stack([before_be, done_be], axis=1) + offset_e, ready


def _runs_on_device(bounds_b2e: IntArray, device: torch.device) -> list[Runs]:
    """One copy to the device for the ranges of all blocks."""
    pairs_b = (bounds_b2e[:, 1] - bounds_b2e[:, 0]).sum(1).tolist()
    on_device = torch.from_numpy(bounds_b2e.astype(np.int32)).to(device)
    return [Runs(bounds, max_pairs=pairs) for bounds, pairs in zip(on_device, pairs_b, strict=True)]


def _sort_by_expert(
    arrivals: list[_Arrival], row_ends: IntArray
) -> tuple[PairIndex, Tensor, Tensor]:
    """Pairs of all blocks in (expert, arrival) order; also each arriving pair's place in it."""
    device = arrivals[0].row.device
    counts_be = np.stack([arrival.counts_e for arrival in arrivals])
    num_local = counts_be.shape[1]
    row = torch.cat(
        [a.row.long() + int(end) - a.num_rows for a, end in zip(arrivals, row_ends, strict=True)]
    )
    expert_host = np.repeat(np.tile(np.arange(num_local), len(arrivals)), counts_be.reshape(-1))
    order_L = torch.from_numpy(np.argsort(expert_host, kind="stable")).to(device)
    place_L = torch.empty_like(order_L)
    place_L[order_L] = torch.arange(len(order_L), device=device)
    row_L = row[order_L]
    num_rows = int(row_ends[-1])
    row_offsets_R1 = torch.zeros(num_rows + 1, dtype=torch.int64, device=device)
    row_offsets_R1[1:] = torch.bincount(row_L, minlength=num_rows).cumsum(0)
    offsets = [0, *np.cumsum(counts_be.sum(0)).tolist()]
    index = PairIndex(
        row_L=row_L.int(),
        offsets_e1=torch.tensor(offsets, dtype=torch.int32, device=device),
        by_row_L=torch.argsort(row_L, stable=True).int(),
        row_offsets_R1=row_offsets_R1.int(),
    )
    score_L = torch.cat([arrival.score for arrival in arrivals])[order_L]
    return index, score_L, place_L
