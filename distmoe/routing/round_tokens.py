"""Rounding as the layer calls it, and as a plain function on anybody's scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Exchange, make_exchange
from distmoe.config import RoundingConfig
from distmoe.registry import ROUNDING_RULES, ROUNDING_TRANSPORTS, SELECTIONS
from distmoe.routing.rounding import Population, Rule
from distmoe.routing.rounding.border import key_sums
from distmoe.routing.rounding.selection import select
from distmoe.routing.routers import Scores, scores_from_probabilities
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class Rounded:
    """``selected_TE`` bool: this rank's pairs. ``freq_E``, ``target_E`` int64: pairs per expert
    over the group, under top-k and after rounding. ``num_tokens``: tokens of the group.
    ``max_pairs``: a bound on this rank's pairs, where the host has one without waiting."""

    selected_TE: Tensor
    freq_E: Tensor
    target_E: Tensor
    num_tokens: int
    max_pairs: int | None


@torch.no_grad()
def round_scores(scores: Scores, exchange: Exchange, rounding: RoundingConfig) -> Rounded:
    """Round over all tokens of the group of ``exchange``; collective, two small all-gathers.

    With one rank nothing waits for the device.
    """
    population, group_tokens = _population(scores, exchange)
    freq_E = population.freq_E
    rule: Rule = ROUNDING_RULES.load(rounding.rule)
    max_pairs = None
    if exchange.size == 1:
        num_experts = scores.chosen_TE.shape[1]
        max_pairs = group_tokens * scores.top_k + rule.most_added(num_experts, rounding.tile)
    if rounding.rule == "none":
        return Rounded(scores.chosen_TE, freq_E, freq_E, group_tokens, max_pairs)
    target_E = rule(
        freq_E,
        tile=rounding.tile,
        num_tokens=group_tokens,
        groups=rounding.balance_groups or exchange.size,
        seed=rounding.seed,
        key_sums=lambda: key_sums(scores, population, tile=rounding.tile, exchange=exchange),
    )
    selected_TE = select(
        rounding.selection,
        scores,
        population,
        target_E,
        tile=rounding.tile,
        exchange=exchange,
        transport=rounding.transport,
    )
    return Rounded(selected_TE, freq_E, target_E, group_tokens, max_pairs)


def _population(scores: Scores, exchange: Exchange) -> tuple[Population, int]:
    """Counts of all ranks, and the tokens of the group."""
    num_tokens, num_experts = scores.chosen_TE.shape
    own_E = scores.chosen_TE.sum(0)
    counts = torch.cat([own_E, own_E.new_full((1,), num_tokens)])
    gathered = exchange.all_gather(counts.int()).long()
    population = Population(gathered[:, :num_experts], gathered[:, num_experts])
    group_tokens = num_tokens if exchange.size == 1 else int(population.tokens_P.sum())
    return population, group_tokens


def round_tokens(
    scores_TE: Tensor,
    top_k: int,
    *,
    tile: int = 128,
    rule: str = "balance",
    selection: str = "exact",
    group: dist.ProcessGroup | None = None,
    balance_groups: int | None = None,
    renormalize: str = "topk",
    seed: int = 0,
    transport: str = "auto",
    exchange: Exchange | None = None,
) -> Routing:
    """Top-k routing whose per-expert counts, summed over ``group``, are multiples of ``tile``.

    ``scores_TE`` fp32 in [0, 1], [T, E]: the router's probabilities of this rank's tokens; T may
    differ between ranks. ``group`` None: this rank alone. ``balance_groups``: equal runs of
    experts over which ``balance`` levels the tiles; by default the ranks of the group. ``seed``:
    of the rules that draw. ``transport``: of the candidates of ``exact``; see
    `rounding.transports`.
    ``exchange``: a transport to use in place of one made for ``group``. Collective.
    ValueError for impossible arguments.
    """
    num_experts = scores_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be in 1..{num_experts}, the number of experts")
    if tile < 1:
        raise ValueError(f"tile is {tile}; it must be at least 1")
    if balance_groups and (balance_groups < 0 or num_experts % balance_groups):
        raise ValueError(
            f"balance_groups is {balance_groups}; it must divide the {num_experts} experts"
        )
    if renormalize not in ("topk", "assigned", "none"):
        raise ValueError(f"renormalize is {renormalize!r}; it must be topk, assigned or none")
    # Before the first collective, so that a wrong name leaves no peer waiting.
    ROUNDING_RULES.load(rule), SELECTIONS.load(selection)
    if transport != "auto":
        ROUNDING_TRANSPORTS.load(transport)
    scores = scores_from_probabilities(scores_TE, top_k=top_k, renormalize=renormalize)
    rounding = RoundingConfig(
        rule,
        tile=tile,
        selection=selection,
        balance_groups=balance_groups or 0,
        seed=seed,
        transport=transport,
    )
    selected_TE = round_scores(scores, exchange or make_exchange(group), rounding).selected_TE
    return Routing.from_mask(selected_TE, scores.weight(selected_TE))
