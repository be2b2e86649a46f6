"""The pairs that arrive at a rank, brought into the order in which its experts compute them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex
from distmoe.moe.schedule import OWN_RUNS, Part

IntArray = NDArray[np.int64]


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
    def of(messages: dict[int, Tensor], from_Pe: IntArray, *, rank: int, runs: int) -> Incoming:
        """``messages``: see `build_plan`. The own rows are cut into halves, not into ``runs``."""
        num_ranks, num_local = from_Pe.shape
        device = messages[rank].device
        rows_PC = torch.zeros(num_ranks, max(runs, OWN_RUNS), dtype=torch.int64, device=device)
        relayed_PC = rows_PC[:, :runs].clone()
        for source, message in messages.items():
            rows_PC[source, :runs] = message[:runs, 0]
            relayed_PC[source] = message[:runs, 1]
        own = rows_PC[rank].sum()
        rows_PC[rank] = 0
        rows_PC[rank, 0], rows_PC[rank, 1] = own - own // 2, own // 2
        pair_L2 = torch.cat([messages[source][runs:] for source in sorted(messages)])
        owner_L = np.repeat(np.arange(num_ranks * num_local), from_Pe.reshape(-1))
        which_L = torch.from_numpy(owner_L).to(device)
        return Incoming(
            rows_PC=rows_PC,
            relayed_PC=relayed_PC,
            row_L=pair_L2[:, 0].long(),
            score_L=pair_L2[:, 1].contiguous().view(torch.float32),
            source_L=which_L // num_local,
            expert_L=which_L % num_local,
        )


@dataclass(frozen=True)
class Arrived:
    """Pairs in (expert, arrival) order. ``place_L`` int64: where each pair of `Incoming` lies. On
    the host: rows of every arrival ``rows_A``, its pairs by expert ``counts_Ae``, and the rows to
    pass on by source and run ``relayed_PC``."""

    index: PairIndex
    score_L: Tensor
    place_L: Tensor
    rows_A: IntArray
    counts_Ae: IntArray
    relayed_PC: IntArray


def arrange(incoming: Incoming, arrivals: list[Part], *, num_local: int) -> Arrived:
    """Rows lie in the order of ``arrivals``, an expert's pairs too. Waits for the device, once."""
    device = incoming.row_L.device
    num_ranks, width = incoming.rows_PC.shape
    flat = [part.rank * width + part.run for part in arrivals]
    number = np.zeros(num_ranks * width, dtype=np.int64)
    number[flat] = np.arange(len(flat))
    flat_A = torch.tensor(flat, device=device)
    number_X = torch.from_numpy(number).to(device)
    # The run of a row: as many runs of its source end before it.
    ends_PC = incoming.rows_PC.cumsum(1)
    run_L = (incoming.row_L[:, None] >= ends_PC[incoming.source_L]).sum(1)
    flat_L = incoming.source_L * width + run_L
    arrival_L = number_X[flat_L]
    rows_A = incoming.rows_PC.view(-1)[flat_A]
    first_A, before_X = rows_A.cumsum(0) - rows_A, (ends_PC - incoming.rows_PC).view(-1)
    row_L = incoming.row_L - before_X[flat_L] + first_A[arrival_L]
    key_L = incoming.expert_L * len(flat) + arrival_L
    order_L = key_L.argsort(stable=True)
    place_L = torch.empty_like(order_L)
    place_L[order_L] = torch.arange(len(order_L), device=device)
    counts_eA = torch.zeros(num_local * len(flat), dtype=torch.int64, device=device)
    counts_eA.scatter_add_(0, key_L, torch.ones_like(key_L))
    counts_eA = counts_eA.view(num_local, len(flat))
    parts = [rows_A, counts_eA.T.reshape(-1), incoming.relayed_PC.reshape(-1)]
    ends = np.cumsum([part.numel() for part in parts[:-1]])
    rows_host, counts_host, relayed_host = np.split(torch.cat(parts).cpu().numpy(), ends)
    return Arrived(
        index=pair_index(row_L[order_L], counts_eA.sum(1), num_rows=int(rows_host.sum())),
        score_L=incoming.score_L[order_L],
        place_L=place_L,
        rows_A=rows_host,
        counts_Ae=counts_host.reshape(len(flat), num_local),
        relayed_PC=relayed_host.reshape(incoming.relayed_PC.shape),
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
