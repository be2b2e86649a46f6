"""What the tokens of a rank send: which rows to which rank, and the message about their pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.moe.schedule import Schedule
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class OutgoingRows:
    """Rows and pairs that this rank's tokens send, rank by rank (this rank included).

    ``token``: int64 [U], the tokens of the rows, ascending inside a rank but for copies. ``row_N``:
    int32, place of a pair's row among the rows of its rank. ``rows_PC``: int32, rows of every run.
    ``pairs_P``: int32, pairs.
    """

    token: Tensor
    row_N: Tensor
    rows_PC: Tensor
    pairs_P: Tensor

    @staticmethod
    def of(routing: Routing, schedule: Schedule, num_ranks: int) -> OutgoingRows:
        """From the routing of this rank's tokens; expert i belongs to rank i // (E / P)."""
        num_local = routing.num_experts // num_ranks
        owner_N = routing.expert_N.long() // num_local
        pairs_P = routing.counts_E.view(num_ranks, num_local).sum(1, dtype=torch.int32)
        if schedule.level == "copies":
            token, row_N, rows_P = _copies(routing.token_N.long(), owner_N, pairs_P)
        else:
            token, row_N, rows_P = _unique(routing, owner_N, num_ranks)
        return OutgoingRows(token, row_N, _runs_of(rows_P, schedule.runs()), pairs_P)


def _copies(token_N: Tensor, owner_N: Tensor, pairs_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A row for every pair."""
    first_P = pairs_P.cumsum(0, dtype=torch.int32) - pairs_P
    place_N = torch.arange(len(token_N), dtype=torch.int32, device=token_N.device)
    return token_N, place_N - first_P[owner_N], pairs_P


def _unique(routing: Routing, owner_N: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """A row for every token and rank that has one of its experts."""
    token_N = routing.token_N.long()
    used_PT = torch.zeros(num_ranks, routing.num_tokens, dtype=torch.bool, device=token_N.device)
    used_PT[owner_N, token_N] = True
    place_PT = used_PT.cumsum(1, dtype=torch.int32) - 1
    rows_P = used_PT.sum(1, dtype=torch.int32)
    return used_PT.nonzero()[:, 1], place_PT[owner_N, token_N], rows_P


def _runs_of(rows_P: Tensor, num_runs: int) -> Tensor:
    """[P, C]: lengths of equal runs of the rows for every rank."""
    edge_C1 = torch.arange(num_runs + 1, device=rows_P.device)
    edge_PC1 = rows_P[:, None].long() * edge_C1 // num_runs
    return edge_PC1.diff(dim=1).int()
