"""The pairs that arrive at a rank, brought into the order in which its experts compute them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex
from distmoe.moe.host_copy import HostCopy, ints, to_device
from distmoe.moe.int_array import IntArray
from distmoe.moe.schedule import OWN_RUNS, Part


@dataclass(frozen=True)
class Incoming:
    """All pairs for this rank, source by source, (expert, token) inside a source. ``rows_PC``
    int64: rows of every run; ``relayed_PC`` int64: rows of the run that this rank passes on;
    ``row_L`` int64, among those of its source, rising with the token; ``source_expert_L`` int64:
    source * e + local expert."""

    rows_PC: Tensor
    relayed_PC: Tensor
    row_L: Tensor
    score_L: Tensor
    source_expert_L: Tensor

    @staticmethod
    def of(
        message_X2: Tensor, from_Pe: Tensor, from_Pe_host: IntArray, *, rank: int, runs: int
    ) -> Incoming:
        """``message_X2`` int32, source by source: a head with the rows of each of its C ``runs``
        for this rank (beside it the rows of the run that this rank shall pass on inside its node),
        then row and bits of the fp32 score of every pair, sorted by (expert, token). The head of a
        source that has nothing for this rank is zero. The own rows are cut into halves, not into
        ``runs``. ``from_Pe``: pairs by source and local expert, which the host has, too."""
        num_ranks, device = len(from_Pe_host), message_X2.device
        lengths = [length for pairs in ints(from_Pe_host.sum(1)) for length in (runs, pairs)]
        parts = torch.split(message_X2, lengths)
        head_PC2, pair_L2 = torch.stack(parts[::2]).long(), torch.cat(parts[1::2])
        rows_PC = torch.zeros(num_ranks, max(runs, OWN_RUNS), dtype=torch.int64, device=device)
        rows_PC[:, :runs] = head_PC2[..., 0]
        own = rows_PC[rank].sum()
        rows_PC[rank] = 0
        half = own // 2
        rows_PC[rank, 0], rows_PC[rank, 1] = own - half, half
        return Incoming(
            rows_PC=rows_PC,
            relayed_PC=head_PC2[..., 1],
            row_L=pair_L2[:, 0].long(),
            score_L=pair_L2[:, 1].contiguous().view(torch.float32),
            source_expert_L=torch.repeat_interleave(
                from_Pe.reshape(-1).long(), output_size=len(pair_L2)
            ),
        )


@dataclass(frozen=True)
class Arrived:
    """Pairs in (expert, arrival) order. ``place_L`` int64: where each pair of `Incoming` lies.
    ``rows_A_host``: rows of every arrival; ``counts_Ae_host``: its pairs by expert;
    ``relayed_PC_host``: rows to pass on by source and run."""

    index: PairIndex
    score_L: Tensor
    place_L: Tensor
    rows_A_host: IntArray
    counts_Ae_host: IntArray
    relayed_PC_host: IntArray


class Arrangement:
    """Rows lie in the order of ``arrivals``, an expert's pairs too. How many rows there are comes
    to the host while other work goes on, until `finish`.

    Nothing is sorted: the pairs of a source, expert and run lie together in `Incoming`, as rows
    rise with the token, so that these segments S = P e C move as they are.
    """

    def __init__(self, incoming: Incoming, arrivals: list[Part], *, num_local: int) -> None:
        num_ranks, width = incoming.rows_PC.shape
        segment_L = _segments(incoming, num_local)
        counts_S = torch.zeros(
            num_ranks * num_local * width, dtype=torch.int64, device=segment_L.device
        )
        counts_S.scatter_add_(0, segment_L, torch.ones_like(segment_L))
        counts_PeC = counts_S.view(num_ranks, num_local, width)
        place_A, number_X = _orders(arrivals, incoming.rows_PC)
        counts_eA = counts_PeC.transpose(0, 1).flatten(1)[:, place_A]
        ends_eA = counts_eA.view(-1).cumsum(0).view_as(counts_eA)
        first_ePC = (ends_eA - counts_eA)[:, number_X].view(num_local, num_ranks, width)
        pairs_by_PeC = first_ePC.transpose(0, 1) - (counts_S.cumsum(0) - counts_S).view_as(
            counts_PeC
        )
        rows_A = incoming.rows_PC.view(-1)[place_A]
        first_PC = (rows_A.cumsum(0) - rows_A)[number_X].view(num_ranks, width)
        rows_by_PC = first_PC - (incoming.rows_PC.cumsum(1) - incoming.rows_PC)
        moves_2S = torch.stack([pairs_by_PeC, rows_by_PC[:, None].expand_as(pairs_by_PeC)])
        pairs_by_L, rows_by_L = moves_2S.view(2, -1)[:, segment_L].unbind()
        self._place_L = torch.arange(len(segment_L), device=segment_L.device) + pairs_by_L
        self._row_L = _moved(incoming.row_L + rows_by_L, self._place_L)
        self._score_L = _moved(incoming.score_L, self._place_L)
        self._offsets_e1 = torch.zeros(num_local + 1, dtype=torch.int32, device=segment_L.device)
        self._offsets_e1[1:] = ends_eA[:, -1]
        self._sizes = HostCopy(rows_A, counts_eA.T, incoming.relayed_PC)

    def finish(self) -> Arrived:
        """Waits for the sizes."""
        rows_A_host, counts_Ae_host, relayed_PC_host = self._sizes.wait()
        by_row_L, row_offsets_R1 = by_row(self._row_L, num_rows=sum(ints(rows_A_host)))
        return Arrived(
            index=PairIndex(self._row_L.int(), self._offsets_e1, by_row_L, row_offsets_R1),
            score_L=self._score_L,
            place_L=self._place_L,
            rows_A_host=rows_A_host,
            counts_Ae_host=counts_Ae_host,
            relayed_PC_host=relayed_PC_host,
        )


def _segments(incoming: Incoming, num_local: int) -> Tensor:
    """int64 [L]: the segment of every pair. Its run is as many as end before its row."""
    ends_PC = incoming.rows_PC.cumsum(1)
    source_L = incoming.source_expert_L // num_local
    run_L = (incoming.row_L[:, None] >= ends_PC[source_L]).sum(1)
    return incoming.source_expert_L * ends_PC.shape[1] + run_L


def _orders(arrivals: list[Part], rows_PC: Tensor) -> tuple[Tensor, Tensor]:
    """For every arrival its place in ``rows_PC``, [A], and for every such place the number of its
    arrival, [P C]."""
    width = rows_PC.shape[1]
    place = np.array([part.rank * width + part.run for part in arrivals])
    number = np.zeros(rows_PC.numel(), dtype=np.int64)
    number[place] = np.arange(len(place))
    both = to_device(np.concatenate([place, number]), rows_PC.device)
    return both[: len(place)], both[len(place) :]


def _moved(x_L: Tensor, place_L: Tensor) -> Tensor:
    return torch.empty_like(x_L).scatter_(0, place_L, x_L)


def by_row(row_L: Tensor, *, num_rows: int) -> tuple[Tensor, Tensor]:
    """`PairIndex.by_row_L` and ``row_offsets_R1``, int32, of pairs with the rows ``row_L``
    (int64)."""
    row_counts_R1 = torch.zeros(num_rows + 1, dtype=torch.int32, device=row_L.device)
    ones_L = torch.ones(len(row_L), dtype=torch.int32, device=row_L.device)
    row_counts_R1[1:].scatter_add_(0, row_L, ones_L)
    # A radix sort takes a pass for every few bits of its keys.
    by_row_L = row_L.int().argsort(stable=True)
    return by_row_L.int(), row_counts_R1.cumsum(0, dtype=torch.int32)
