"""Rounding as the layer calls it, and as a plain function on anybody's scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Exchange, make_exchange
from distmoe.comm.local import LocalExchange
from distmoe.comm.torch_group import check_group
from distmoe.config import RoundingConfig
from distmoe.registry import ROUNDING_RULES, ROUNDING_TRANSPORTS, SELECTIONS
from distmoe.routing.rounding import Population, Rule, owned_part
from distmoe.routing.rounding.border import key_sums
from distmoe.routing.rounding.capacity import cap
from distmoe.routing.rounding.selection import select
from distmoe.routing.routers import Scores, scores_from_probabilities
from distmoe.routing.routing import Routing


@dataclass(frozen=True)
class Rounded:
    """``selected_TE`` bool: this rank's pairs. ``freq_E``, ``target_E`` int64: pairs per expert
    over the group, under top-k and after rounding. ``from_ranks_Pe`` int64: pairs that every rank
    has for the experts of this one after rounding; None where this rank cannot know. ``num_tokens``
    of the group. ``max_pairs``: a bound on this rank's pairs."""

    selected_TE: Tensor
    freq_E: Tensor
    target_E: Tensor
    from_ranks_Pe: Tensor | None
    num_tokens: int | Tensor
    max_pairs: int


@torch.no_grad()
def round_scores(scores: Scores, exchange: Exchange, rounding: RoundingConfig) -> Rounded:
    """Round over all tokens of the group of ``exchange``; collective.

    One all-gather carries the counts of top-k, which a dispatcher without drops needs anyway, and
    all that the rules of counts need; the selection ``exact`` adds one small round (two for the
    transport ``owner``), a capacity four under ``exact``. With one rank nothing waits for the
    device.
    """
    population = _population(scores, exchange)
    rounded = Rounded(
        selected_TE=scores.chosen_TE,
        freq_E=population.freq_E,
        target_E=population.freq_E,
        from_ranks_Pe=owned_part(population.counts_PE, exchange),
        num_tokens=len(scores.chosen_TE) if exchange.size == 1 else population.tokens_P.sum(),
        max_pairs=_most_pairs(scores, exchange, rounding),
    )
    if not rounding.capacity_factor and not _rounds(rounding):
        return rounded
    if rounding.scope == "rank":
        return _round_alone(rounded, scores, population, exchange, rounding)
    return _round_together(rounded, scores, population, exchange, rounding)


def _rounds(rounding: RoundingConfig) -> bool:
    return rounding.rule != "none" and rounding.tile > 1


def _most_pairs(scores: Scores, exchange: Exchange, rounding: RoundingConfig) -> int:
    """A bound on this rank's pairs that needs no counts."""
    num_tokens, num_experts = scores.chosen_TE.shape
    rule: Rule = ROUNDING_RULES.load(rounding.rule)
    added = rule.most_added(num_experts, rounding.tile)
    if added and exchange.size > 1:
        # Among all ranks what others drop makes room, but an expert changes by less than a tile.
        added = num_experts * (rounding.tile - 1)
    return min(num_tokens * scores.top_k + added, num_tokens * num_experts)


def _round_together(
    plain: Rounded,
    scores: Scores,
    population: Population,
    exchange: Exchange,
    rounding: RoundingConfig,
) -> Rounded:
    """First the capacity, then tiles of what it leaves."""
    rounded = plain
    if rounding.capacity_factor:
        scores, population = cap(scores, population, exchange=exchange, rounding=rounding)
        rounded = replace(
            plain,
            selected_TE=scores.chosen_TE,
            target_E=population.freq_E,
            from_ranks_Pe=owned_part(population.counts_PE, exchange),
        )
    if not _rounds(rounding):
        return rounded
    return _to_tiles(rounded, scores, population, exchange, rounding)


def _to_tiles(
    plain: Rounded,
    scores: Scores,
    population: Population,
    exchange: Exchange,
    rounding: RoundingConfig,
) -> Rounded:
    rule: Rule = ROUNDING_RULES.load(rounding.rule)
    target_E = rule(
        population.freq_E,
        tile=rounding.tile,
        room=population.room_PE.sum(0),
        groups=rounding.balance_groups or exchange.size,
        seed=rounding.seed,
        key_sums=lambda: key_sums(scores, population, tile=rounding.tile, exchange=exchange),
    )
    selected_TE, amounts = select(
        rounding.selection,
        scores,
        population,
        target_E,
        tile=rounding.tile,
        exchange=exchange,
        transport=rounding.transport,
    )
    from_ranks_Pe = plain.from_ranks_Pe
    sign_e = owned_part((target_E - population.freq_E).sign()[None], exchange)
    if from_ranks_Pe is not None and amounts.here_Pe is not None and sign_e is not None:
        from_ranks_Pe = from_ranks_Pe + sign_e * amounts.here_Pe
    return replace(plain, selected_TE=selected_TE, target_E=target_E, from_ranks_Pe=from_ranks_Pe)


def _round_alone(
    plain: Rounded,
    scores: Scores,
    population: Population,
    exchange: Exchange,
    rounding: RoundingConfig,
) -> Rounded:
    """Every rank on its own tokens, over the same groups of experts; a baseline. What it did is
    told by one more all-gather."""
    own = population.of_rank(exchange.rank)
    alone = _round_together(
        replace(plain, from_ranks_Pe=None),
        scores,
        own,
        LocalExchange(),
        replace(rounding, balance_groups=rounding.balance_groups or exchange.size),
    )
    counts_PE = exchange.all_gather(alone.target_E.int(), kind="counts").long()
    return replace(
        plain,
        selected_TE=alone.selected_TE,
        target_E=counts_PE.sum(0),
        from_ranks_Pe=owned_part(counts_PE, exchange),
    )


def _population(scores: Scores, exchange: Exchange) -> Population:
    """Counts of all ranks, in one message of 4 (E + 1) bytes; 4 (2 E + 1) where routing is limited
    to groups of experts."""
    num_tokens, num_experts = scores.chosen_TE.shape
    own_E = scores.chosen_TE.sum(0)
    # Filled on the device: a copy from the host would wait for it.
    counts = [own_E, own_E.new_full((1,), num_tokens)]
    if scores.allowed_TE is not None:
        counts.append(scores.allowed_TE.sum(0))
    gathered = exchange.all_gather(torch.cat(counts).int(), kind="counts").long()
    counts_PE, tokens_P1, room_PE = gathered.tensor_split((num_experts, num_experts + 1), dim=1)
    limited = scores.allowed_TE is not None
    return Population(counts_PE, tokens_P1.squeeze(1), room_PE if limited else tokens_P1)


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
    capacity_factor: float = 0.0,
    capacity_of: Literal["expert", "rank"] = "expert",
    exchange: Exchange | None = None,
) -> Routing:
    """Top-k routing whose per-expert counts, summed over ``group``, are multiples of ``tile``.

    ``scores_TE`` fp32 in [0, 1], [T, E]: the router's probabilities of this rank's tokens; T may
    differ between ranks. ``group`` None: this rank alone. ``balance_groups``: equal runs of
    experts over which ``balance`` levels the tiles; by default the ranks of the group. ``seed``:
    of the rules that draw. ``transport``: of the candidates of ``exact``; see
    `rounding.transports`. ``capacity_factor``: no expert gets more than the tiles that hold so many
    times the mean, nor any balance group if ``capacity_of`` is "rank"; see `rounding.capacity`. 0:
    no bound.
    ``exchange``: a transport to use in place of one made for ``group``. Collective.
    ValueError for impossible arguments, RuntimeError for scores that are none.
    """
    _check_scores(scores_TE)
    check_group("group", group)
    rounding = RoundingConfig(
        rule,
        tile=tile,
        selection=selection,
        balance_groups=balance_groups or 0,
        seed=seed,
        transport=transport,
        capacity_factor=capacity_factor,
        capacity_of=capacity_of,
    )
    # Before the first collective, so that a wrong argument leaves no peer waiting.
    _check(rounding, num_experts=scores_TE.shape[1], top_k=top_k, renormalize=renormalize)
    scores = scores_from_probabilities(scores_TE, top_k=top_k, renormalize=renormalize)
    selected_TE = round_scores(scores, exchange or make_exchange(group), rounding).selected_TE
    return Routing.from_mask(selected_TE, scores.weight(selected_TE))


def _check_scores(scores_TE: Tensor) -> None:
    if scores_TE.ndim != 2 or scores_TE.dtype != torch.float32:
        raise ValueError(
            f"scores_TE is {scores_TE.dtype} of the shape {tuple(scores_TE.shape)}; it must be "
            "torch.float32 [T, E]"
        )
    # Asked on the device. A step that has diverged is somebody else's to see.
    outside_TE = ((scores_TE < 0) | (scores_TE > 1)) & scores_TE.isfinite()
    torch._assert_async(
        ~outside_TE.any(),
        "scores_TE has numbers outside of [0, 1]; it must be a router's probabilities, not logits",
    )


def _check(rounding: RoundingConfig, *, num_experts: int, top_k: int, renormalize: str) -> None:
    groups, factor = rounding.balance_groups, rounding.capacity_factor
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; it must be in 1..{num_experts}, the number of experts")
    if rounding.tile < 1:
        raise ValueError(f"tile is {rounding.tile}; it must be at least 1")
    if groups and (groups < 0 or num_experts % groups):
        raise ValueError(f"balance_groups is {groups}; it must divide the {num_experts} experts")
    if renormalize not in ("topk", "assigned", "none"):
        raise ValueError(f"renormalize is {renormalize!r}; it must be topk, assigned or none")
    if not (factor == 0 or 1 <= factor < math.inf):
        raise ValueError(f"capacity_factor is {factor}; it must be 0 or at least 1")
    if rounding.capacity_of not in ("expert", "rank"):
        raise ValueError(f"capacity_of is {rounding.capacity_of!r}; it must be expert or rank")
    ROUNDING_RULES.load(rounding.rule), SELECTIONS.load(rounding.selection)
    if rounding.transport != "auto":
        ROUNDING_TRANSPORTS.load(rounding.transport)
