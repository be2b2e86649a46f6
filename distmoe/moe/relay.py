"""What a rank passes on inside its node: rows of other nodes' tokens, and their partial sums back.

A token crosses to a node once, to the rank there that has the same place as its own rank, the
*relay*. The relay sends the row to the ranks of its node that have one of the token's experts, adds
up their partial sums, and sends one row home.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distmoe.comm import Exchange, exchange_now
from distmoe.moe.host_copy import HostCopy, ints, to_device
from distmoe.moe.int_array import IntArray


@dataclass(frozen=True)
class Duty:
    """The rows of one block that this rank passes on. ``num_rows`` come from the rank of the same
    place in node ``source``; ``to_G``: for every rank of this node, int64 places among them of the
    rows that it needs, ascending."""

    source: int
    num_rows: int
    to_G: list[Tensor]


def duties(
    needed_from_Q: dict[int, Tensor], rows_QC_host: IntArray, *, width: int
) -> dict[tuple[int, int], Duty]:
    """By source node and run. ``needed_from_Q[q]``: uint8 [rows of q, G], which rank of this node
    needs which row. Waits for the device, once."""
    order = sorted(needed_from_Q)
    if not order:
        return {}
    needed_UG = torch.cat([needed_from_Q[q] for q in order]).bool()
    device = needed_UG.device
    lengths = np.concatenate([rows_QC_host[q] for q in order])
    run_U = to_device(np.repeat(np.arange(len(lengths)), lengths), device)
    first_X = to_device(np.cumsum(lengths) - lengths, device)
    counts_XG = torch.zeros(len(lengths), width, dtype=torch.int64, device=device)
    counts_XG.index_add_(0, run_U, needed_UG.long())
    counts = HostCopy(counts_XG.T)
    # Rank by rank, and inside a rank in the order of the rows.
    place_X = torch.nonzero_static(needed_UG.T, size=needed_UG.numel(), fill_value=0)[:, 1]
    if len(run_U):
        place_X = place_X - first_X[run_U[place_X]]
    (counts_GX_host,) = counts.wait()
    parts = iter(torch.split(place_X[: counts_GX_host.sum()], ints(counts_GX_host)))
    by_rank = [[next(parts) for _ in lengths] for _ in range(width)]
    num_runs = rows_QC_host.shape[1]
    return {
        (q, run): Duty(
            source=q,
            num_rows=int(rows_QC_host[q, run]),
            to_G=[by_rank[g][i * num_runs + run] for g in range(width)],
        )
        for i, q in enumerate(order)
        for run in range(num_runs)
    }


def exchange_needs(
    relay_UG: Tensor,
    sent_slices: list[slice],
    rows_QC_host: IntArray,
    rail: Exchange,
    *,
    place: int,
) -> dict[int, Tensor]:
    """To the relays of the other nodes, one byte a row and rank of their node; from every node q,
    uint8 [rows of q, G]. ``sent_slices``: this rank's rows by rank; collective over the rail."""
    width = relay_UG.shape[1]
    others = [q for q in range(rail.size) if q != rail.rank]
    received = {q: relay_UG.new_empty(int(rows_QC_host[q].sum()), width).byte() for q in others}
    parts = {q: relay_UG[sent_slices[q * width + place]].byte() for q in others}
    exchange_now(rail, "needs", received, parts)
    return received
