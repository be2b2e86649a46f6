"""The arrangement by cumulative sums over the segments S = P e C, and two scatters."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.arrange_pairs import HALVES, ArrangedPairs, Messages


def arrange(messages: Messages, place_A: Tensor) -> ArrangedPairs:
    """See `arrange_pairs`."""
    num_ranks, num_local = messages.from_Pe.shape
    head_PC2, pair_L2 = _parted(messages)
    rows_PC = _rows(head_PC2[..., 0], messages)
    segment_L = _segments(pair_L2[:, 0], rows_PC, messages)
    counts_S = segment_L.new_zeros(num_ranks * num_local * messages.width)
    counts_S.scatter_add_(0, segment_L, torch.ones_like(segment_L))
    counts_PeC = counts_S.view(num_ranks, num_local, messages.width)
    number_X = _numbers(place_A, rows_PC.numel())
    counts_eA = counts_PeC.transpose(0, 1).flatten(1)[:, place_A]
    ends_eA = counts_eA.view(-1).cumsum(0).view_as(counts_eA)
    first_ePC = (ends_eA - counts_eA)[:, number_X].view(num_local, num_ranks, messages.width)
    before_S = counts_S.cumsum(0) - counts_S
    pairs_by_PeC = first_ePC.transpose(0, 1) - before_S.view_as(counts_PeC)
    rows_A = rows_PC.view(-1)[place_A]
    first_PC = (rows_A.cumsum(0) - rows_A)[number_X].view_as(rows_PC)
    rows_by_PC = first_PC - (rows_PC.cumsum(1) - rows_PC)
    moves_2S = torch.stack([pairs_by_PeC, rows_by_PC[:, None].expand_as(pairs_by_PeC)])
    pairs_by_L, rows_by_L = moves_2S.view(2, -1)[:, segment_L].unbind()
    place_L = torch.arange(len(segment_L), device=segment_L.device) + pairs_by_L
    offsets_e1 = torch.zeros(num_local + 1, dtype=torch.int32, device=segment_L.device)
    offsets_e1[1:] = ends_eA[:, -1]
    return ArrangedPairs(
        row_L=_moved((pair_L2[:, 0] + rows_by_L).int(), place_L),
        score_L=_moved(pair_L2[:, 1].contiguous().view(torch.float32), place_L),
        offsets_e1=offsets_e1,
        place_L=place_L,
        rows_A=rows_A,
        counts_Ae=counts_eA.T.contiguous(),
        relayed_PC=head_PC2[..., 1],
    )


def _parted(messages: Messages) -> tuple[Tensor, Tensor]:
    """Heads int64 [P, C, 2] and pairs int32 [L, 2]."""
    lengths = [length for pairs in messages.pairs_P for length in (messages.runs, pairs)]
    parts = torch.split(messages.message_X2, lengths)
    return torch.stack(parts[::2]).long(), torch.cat(parts[1::2])


def _rows(told_PC: Tensor, messages: Messages) -> Tensor:
    """int64 [P, width]: rows of every run, the own ones in halves."""
    rows_PC = told_PC.new_zeros(len(told_PC), messages.width)
    rows_PC[:, : messages.runs] = told_PC
    own = rows_PC[messages.rank].sum()
    rows_PC[messages.rank] = 0
    half = own // HALVES
    rows_PC[messages.rank, 0], rows_PC[messages.rank, 1] = own - half, half
    return rows_PC


def _segments(row_L: Tensor, rows_PC: Tensor, messages: Messages) -> Tensor:
    """int64 [L]: the segment of every pair. Its run is as many as end before its row."""
    source_expert_L = torch.repeat_interleave(
        messages.from_Pe.reshape(-1).long(), output_size=len(row_L)
    )
    ends_PC = rows_PC.cumsum(1)
    source_L = source_expert_L // messages.from_Pe.shape[1]
    run_L = (row_L[:, None] >= ends_PC[source_L]).sum(1)
    return source_expert_L * messages.width + run_L


def _numbers(place_A: Tensor, num_places: int) -> Tensor:
    """int64: for every place the number of its arrival."""
    number_A = torch.arange(len(place_A), device=place_A.device)
    return number_A.new_zeros(num_places).scatter_(0, place_A.long(), number_A)


def _moved(x_L: Tensor, place_L: Tensor) -> Tensor:
    return torch.empty_like(x_L).scatter_(0, place_L, x_L)
