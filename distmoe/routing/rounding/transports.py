"""Two ways to merge the candidates of all ranks, with the same result.

`all_gather`: every rank receives all candidates and merges for itself; 4 E (M - 1) bytes from every
rank to every rank. `owner`: a rank sends an expert's candidates to the rank that owns the expert,
which answers with one integer; 4 E (M - 1) bytes from every rank in all, whatever their number, and
one more short round. Worth it where many ranks share the experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmoe.comm import Exchange, exchange_now
from distmoe.kernels.round_select import load_round_select
from distmoe.registry import ROUNDING_TRANSPORTS
from distmoe.routing.rounding import Amounts

# Up to here the bytes of an all-gather are cheaper than a second round.
MOST_RANKS_OF_ALL_GATHER = 16

Transport = Callable[[Exchange, Tensor, Tensor, Tensor], Amounts]


def transport_for(name: str, exchange: Exchange, *, num_experts: int) -> Transport:
    """``auto`` or a name; ValueError for another name, or where the experts have no owners."""
    divisible = num_experts % exchange.size == 0
    if name == "auto":
        name = "owner" if divisible and exchange.size > MOST_RANKS_OF_ALL_GATHER else "all_gather"
    if name == "owner" and not divisible:
        raise ValueError(
            f"transport is 'owner'; the {exchange.size} ranks must divide the {num_experts} experts"
        )
    transport: Transport = ROUNDING_TRANSPORTS.load(name)
    return transport


def by_all_gather(exchange: Exchange, best_EC: Tensor, adds_E: Tensor, amount_E: Tensor) -> Amounts:
    """How many of each rank's candidates are among the best ``amount_E`` of the group.

    ``best_EC`` int32: this rank's priorities, descending. Collective.
    """
    gathered_PEC = exchange.all_gather(best_EC, kind="candidates")
    merged_PE = load_round_select(best_EC).merge(gathered_PEC, adds_E, amount_E)
    return Amounts.of_all(merged_PE, exchange)


def by_owner(exchange: Exchange, best_EC: Tensor, adds_E: Tensor, amount_E: Tensor) -> Amounts:
    """The same, merged by the owner of each expert."""
    num_local = len(best_EC) // exchange.size
    own = slice(exchange.rank * num_local, (exchange.rank + 1) * num_local)
    candidates_PeC = _swap(exchange, "candidates", best_EC.view(exchange.size, num_local, -1))
    answers_Pe = load_round_select(best_EC).merge(candidates_PeC, adds_E[own], amount_E[own])
    own_E = _swap(exchange, "accepted", answers_Pe.int()).view(-1).long()
    return Amounts(own_E, answers_Pe)


def _swap(exchange: Exchange, kind: str, parts: Tensor) -> Tensor:
    """parts[p] goes to rank p, and the result's [p] came from it."""
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    received[exchange.rank] = parts[exchange.rank]
    peers = [peer for peer in range(exchange.size) if peer != exchange.rank]
    recv = {peer: received[peer] for peer in peers}
    exchange_now(exchange, kind, recv, {peer: parts[peer].contiguous() for peer in peers})
    return received
