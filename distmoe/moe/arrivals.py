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
    ``row_L`` int64, among those of its source; ``expert_L`` local."""

    rows_PC: Tensor
    relayed_PC: Tensor
    row_L: Tensor
    score_L: Tensor
    source_L: Tensor
    expert_L: Tensor

    @staticmethod
    def of(message_X2: Tensor, from_Pe_host: IntArray, *, rank: int, runs: int) -> Incoming:
        """``message_X2`` int32, source by source: a head with the rows of each of its C ``runs``
        for this rank (beside it the rows of the run that this rank shall pass on inside its node),
        then row and bits of the fp32 score of every pair, sorted by (expert, token). The head of a
        source that has nothing for this rank is zero. The own rows are cut into halves, not into
        ``runs``."""
        num_ranks, num_local = from_Pe_host.shape
        device = message_X2.device
        lengths = [length for pairs in ints(from_Pe_host.sum(1)) for length in (runs, pairs)]
        parts = torch.split(message_X2, lengths)
        head_PC2, pair_L2 = torch.stack(parts[::2]).long(), torch.cat(parts[1::2])
        rows_PC = torch.zeros(num_ranks, max(runs, OWN_RUNS), dtype=torch.int64, device=device)
        rows_PC[:, :runs] = head_PC2[..., 0]
        own = rows_PC[rank].sum()
        rows_PC[rank] = 0
        rows_PC[rank, 0], rows_PC[rank, 1] = own - own // 2, own // 2
        which = np.repeat(np.arange(num_ranks * num_local), from_Pe_host.reshape(-1))
        which_L = to_device(which, device)
        return Incoming(
            rows_PC=rows_PC,
            relayed_PC=head_PC2[..., 1],
            row_L=pair_L2[:, 0].long(),
            score_L=pair_L2[:, 1].contiguous().view(torch.float32),
            source_L=which_L // num_local,
            expert_L=which_L % num_local,
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
    to the host while other work goes on, until `finish`."""

    def __init__(self, incoming: Incoming, arrivals: list[Part], *, num_local: int) -> None:
        width = incoming.rows_PC.shape[1]
        flat_A = np.array([part.rank * width + part.run for part in arrivals])
        number = np.zeros(incoming.rows_PC.numel(), dtype=np.int64)
        number[flat_A] = np.arange(len(flat_A))
        device = incoming.row_L.device
        number_X, place_A = to_device(number, device), to_device(flat_A, device)
        # The run of a row: as many runs of its source end before it.
        ends_PC = incoming.rows_PC.cumsum(1)
        run_L = (incoming.row_L[:, None] >= ends_PC[incoming.source_L]).sum(1)
        flat_L = incoming.source_L * width + run_L
        arrival_L = number_X[flat_L]
        rows_A = incoming.rows_PC.view(-1)[place_A]
        first_A, before_X = rows_A.cumsum(0) - rows_A, (ends_PC - incoming.rows_PC).view(-1)
        row_L = incoming.row_L - before_X[flat_L] + first_A[arrival_L]
        key_L = incoming.expert_L * len(flat_A) + arrival_L
        order_L = key_L.argsort(stable=True)
        counts_eA = torch.zeros(num_local * len(flat_A), dtype=torch.int64, device=device)
        counts_eA.scatter_add_(0, key_L, torch.ones_like(key_L))
        self._counts_Ae = counts_eA.view(num_local, -1).T
        self._row_L, self._score_L = row_L[order_L], incoming.score_L[order_L]
        self._place_L = torch.empty_like(order_L)
        self._place_L[order_L] = torch.arange(len(order_L), device=device)
        self._sizes = HostCopy(rows_A, self._counts_Ae, incoming.relayed_PC)

    def finish(self) -> Arrived:
        """Waits for the sizes."""
        rows_A_host, counts_Ae_host, relayed_PC_host = self._sizes.wait()
        num_rows = sum(ints(rows_A_host))
        return Arrived(
            index=pair_index(self._row_L, self._counts_Ae.sum(0), num_rows=num_rows),
            score_L=self._score_L,
            place_L=self._place_L,
            rows_A_host=rows_A_host,
            counts_Ae_host=counts_Ae_host,
            relayed_PC_host=relayed_PC_host,
        )


def pair_index(row_L: Tensor, counts_e: Tensor, *, num_rows: int) -> PairIndex:
    """The index of pairs that are sorted by expert."""
    offsets_e1 = torch.zeros(len(counts_e) + 1, dtype=torch.int32, device=row_L.device)
    offsets_e1[1:] = counts_e.cumsum(0)
    row_counts_R = torch.zeros(num_rows, dtype=torch.int64, device=row_L.device)
    row_counts_R.scatter_add_(0, row_L, torch.ones_like(row_L))
    row_offsets_R1 = torch.zeros(num_rows + 1, dtype=torch.int32, device=row_L.device)
    row_offsets_R1[1:] = row_counts_R.cumsum(0)
    return PairIndex(
        row_L=row_L.int(),
        offsets_e1=offsets_e1,
        by_row_L=row_L.argsort(stable=True).int(),
        row_offsets_R1=row_offsets_R1,
    )
