"""What the tokens of a rank send: which rows to which rank, and the message about their pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.moe.schedule import Schedule
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class OutgoingRows:
    """Rows and pairs that this rank's tokens send, rank by rank (this rank included).

    ``row_N``: int32, place of a pair's row among the rows of its rank. ``rows_PC``: int32, rows of
    every run at the rank that computes them. ``token``: int64 [U], the tokens of the rows that this
    rank sends itself, and ``sent_PC`` their number: other than ``rows_PC`` where rows are relayed.
    ``relay_UG`` bool: of every sent row the ranks of the node that need it; None without relays.
    ``pairs_P``: int32, pairs.

    Made without waiting for the device: arrays over pairs and rows may be longer than there are.
    """

    token: Tensor
    row_N: Tensor
    rows_PC: Tensor
    sent_PC: Tensor
    relay_UG: Tensor | None
    pairs_P: Tensor

    @staticmethod
    def of(routing: Routing, schedule: Schedule, rank: int, num_ranks: int) -> OutgoingRows:
        """From the routing of this rank's tokens; expert i belongs to rank i // (E / P)."""
        num_local = routing.num_experts // num_ranks
        token_N, owner_N = routing.token_N.long(), routing.expert_N.long() // num_local
        pairs_P = routing.counts_E.view(num_ranks, num_local).sum(1, dtype=torch.int32)
        if schedule.level == "copies":
            row_N = _places_of_copies(owner_N, pairs_P)
            rows_PC = _equal_runs(pairs_P, schedule.runs())
            return OutgoingRows(token_N, row_N, rows_PC, rows_PC, None, pairs_P)
        used_PT = _used(routing, owner_N, num_ranks)
        row_N = (used_PT.cumsum(1, dtype=torch.int32) - 1)[owner_N, token_N]
        if schedule.level == "node":
            rows_PC, sent_PC, sent_PT, needed_QGT = _by_node(used_PT, schedule, rank)
            # Every row that is sent is there for a pair of its own.
            target_U, token_U = _places_of(sent_PT, at_most=len(token_N))
            relay_UG = needed_QGT[target_U // schedule.ranks_per_node, :, token_U]
            return OutgoingRows(token_U, row_N, rows_PC, sent_PC, relay_UG, pairs_P)
        rows_PC = _equal_runs(used_PT.sum(1), schedule.runs())
        _, token_U = _places_of(used_PT, at_most=len(token_N))
        return OutgoingRows(token_U, row_N, rows_PC, rows_PC, None, pairs_P)

    def first(self, *, rows: int, pairs: int) -> OutgoingRows:
        """Without what lies behind the last row, and the last pair."""
        return replace(
            self,
            token=self.token[:rows],
            row_N=self.row_N[:pairs],
            relay_UG=None if self.relay_UG is None else self.relay_UG[:rows],
        )


def _used(routing: Routing, owner_N: Tensor, num_ranks: int) -> Tensor:
    """[P, T] bool: the rank has one of the token's experts."""
    place_N = torch.arange(len(owner_N), device=owner_N.device)
    # What lies behind the last pair marks a row that nobody reads.
    owner_N = torch.where(place_N < routing.token_offsets_T1[-1], owner_N, num_ranks)
    used = torch.zeros(num_ranks + 1, routing.num_tokens, dtype=torch.bool, device=owner_N.device)
    used[owner_N, routing.token_N.long()] = True
    return used[:num_ranks]


def _places_of(mask_PT: Tensor, *, at_most: int) -> tuple[Tensor, Tensor]:
    """Rank and token of every place that is set, row by row; zeros behind the last."""
    places = torch.nonzero_static(mask_PT, size=at_most, fill_value=0)
    rank_U, token_U = places.unbind(1)
    return rank_U, token_U


def _places_of_copies(owner_N: Tensor, pairs_P: Tensor) -> Tensor:
    """int32: the place of every pair among those of its rank."""
    first_P = pairs_P.cumsum(0, dtype=torch.int32) - pairs_P
    place_N = torch.arange(len(owner_N), dtype=torch.int32, device=owner_N.device)
    return place_N - first_P[owner_N]


def _by_node(
    used_PT: Tensor, schedule: Schedule, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows for the ranks of the own node, and one for every other node that needs the token, sent
    to the rank of the same place there. Cut by nodes, so that a run of a node's rows holds the same
    tokens for all of its ranks. Rows by run at the ranks that compute them [P, C], those that this
    rank sends [P, C], their tokens as a mask [P, T], and which rank needs what [Q, G, T]."""
    num_ranks, num_tokens = used_PT.shape
    width, num_runs = schedule.ranks_per_node, schedule.runs()
    node, place = divmod(rank, width)
    needed_QGT = used_PT.view(num_ranks // width, width, num_tokens)
    used_QT = needed_QGT.any(1)
    length_Q1 = used_QT.sum(1, keepdim=True)
    # The run of a row r of n, equal runs: the largest c with n c // C <= r.
    run_QT = (used_QT.cumsum(1) * num_runs - 1) // length_Q1.clamp(min=1)
    # Near rows are not cut.
    run_QT[node] = 0
    in_run_QTC = run_QT[:, :, None] == torch.arange(num_runs, device=used_PT.device)
    rows_PC = (needed_QGT[..., None] & in_run_QTC[:, None]).sum(2).view(num_ranks, num_runs)
    sent_PT = torch.zeros_like(used_PT)
    sent_PT[place::width] = used_QT
    sent_PT[node * width : (node + 1) * width] = needed_QGT[node]
    sent_PC = torch.zeros_like(rows_PC)
    sent_PC[place::width] = (used_QT[..., None] & in_run_QTC).sum(1)
    sent_PC[node * width : (node + 1) * width] = rows_PC[node * width : (node + 1) * width]
    return rows_PC.int(), sent_PC.int(), sent_PT, needed_QGT


def _equal_runs(rows_P: Tensor, num_runs: int) -> Tensor:
    """[P, C]: lengths of equal runs of the rows for every rank."""
    edge_C1 = torch.arange(num_runs + 1, device=rows_P.device)
    edge_PC1 = rows_P[:, None].long() * edge_C1 // num_runs
    return edge_PC1.diff(dim=1).int()
