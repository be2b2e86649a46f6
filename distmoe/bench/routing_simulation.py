"""What rounding does to a routing: tiles of the busiest rank, padding, pairs and score mass moved.

Works on the scores of all tokens of an expert-parallel group in one process, which is exact: the
`exact` selection of P ranks is the rule on their tokens together.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.config import RoundingConfig
from distmoe.kernels.round_select import NOTHING
from distmoe.kernels.router_topk import KEY_SCALE
from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.metrics.routing_trace import GroupRouting
from distmoe.routing.round_tokens import round_scores
from distmoe.routing.routers import Scores, scores_from_probabilities

TOP_K = "top-k, padded"
LOCAL = "balance, each rank alone"
CAPACITIES_OF = ("rank", "expert")


@dataclass(frozen=True)
class Setting:
    """``tokens`` of one rank; ``tile`` M. Of synthetic scores ``skew``: standard deviation of the
    experts' popularity in units of that of a token's own taste. Of a trace ``layer``: the index of
    its block."""

    tokens: int
    num_experts: int
    top_k: int
    ranks: int
    tile: int
    skew: float | None = None
    layer: int | None = None

    @property
    def tokens_per_expert_over_tile(self) -> float:
        """Mean, over the group."""
        return self.tokens * self.ranks * self.top_k / self.num_experts / self.tile


@dataclass(frozen=True)
class Outcome:
    """Of one way to round, on one population or as means over several. Tiles of a rank are those of
    its experts; shares are of 1.

    ``worst_busiest_over_mean``: over the populations. ``waste``: padding rows over the rows that
    run. ``dropped``, ``added``: pairs over those of top-k. ``score_lost``, ``score_added``: scores
    of dropped and of added pairs over those of the top-k pairs.
    """

    name: str
    busiest_tiles: float
    mean_tiles: float
    busiest_over_mean: float
    worst_busiest_over_mean: float
    waste: float
    dropped: float
    added: float
    score_lost: float
    score_added: float
    tokens_without_expert: float


def synthetic_scores(setting: Setting, *, seed: int = 0) -> Scores:
    """Of ranks * tokens tokens: softmax of a token's taste plus the experts' popularity."""
    generator = torch.Generator().manual_seed(seed)
    shape = setting.ranks * setting.tokens, setting.num_experts
    taste_TE = torch.randn(shape, generator=generator)
    popularity_E = torch.randn(setting.num_experts, generator=generator)
    score_TE = (taste_TE + (setting.skew or 0.0) * popularity_E).softmax(dim=1)
    return scores_from_probabilities(score_TE, top_k=setting.top_k, renormalize="topk")


def traced_scores(routing: GroupRouting) -> Scores:
    """The scores that a run's router gave; 24 bits of each, which fp32 holds exactly."""
    key_TE = torch.from_numpy(routing.key_TE)
    allowed_TE = key_TE > NOTHING
    mass_TE = torch.from_numpy(routing.mass_TE)
    return Scores(
        score_TE=mass_TE / KEY_SCALE,
        key_TE=key_TE,
        chosen_TE=choose_top_k(key_TE, routing.top_k),
        top_k=routing.top_k,
        renormalize="topk",
        allowed_TE=None if bool(allowed_TE.all()) else allowed_TE,
        bias_E=_bias(key_TE - mass_TE, allowed_TE),
    )


def _bias(extra_TE: Tensor, allowed_TE: Tensor) -> Tensor | None:
    """What all keys of an expert have above their scores; None where that is nothing, or not one
    number for each expert, as of a forced router."""
    least_E = torch.where(allowed_TE, extra_TE, -NOTHING).amin(0)
    most_E = torch.where(allowed_TE, extra_TE, NOTHING).amax(0)
    # Reversed where no token may take the expert.
    bias_E = torch.where(least_E <= most_E, least_E, 0)
    return bias_E if bool((least_E >= most_E).all() and bias_E.any()) else None


def simulate(
    scores: Scores, rules: list[str], *, ranks: int, tile: int, capacities: Sequence[float] = ()
) -> list[Outcome]:
    """Top-k with padded tiles, every rule over the group of ``ranks`` equal parts of the tokens,
    `balance` with each of the factors ``capacities``, of experts and of ranks, and on each rank
    alone. AssertionError if the parts are not equal."""
    if len(scores.key_TE) % ranks:
        raise AssertionError(f"{len(scores.key_TE)} tokens are no {ranks} equal parts")
    ways = {TOP_K: scores.chosen_TE}
    ways |= {rule: _rounded(scores, rule, groups=ranks, tile=tile) for rule in rules}
    for factor, of in itertools.product(capacities, CAPACITIES_OF):
        ways[f"balance, capacity {factor:g} of {of}s"] = _rounded(
            scores, "balance", groups=ranks, tile=tile, capacity_factor=factor, capacity_of=of
        )
    alone = [_rounded(part, "balance", groups=ranks, tile=tile) for part in _parts(scores, ranks)]
    ways[LOCAL] = torch.cat(alone)
    mass_TE = integer_keys(scores.score_TE).long()
    return [
        _outcome(name, scores.chosen_TE, mask_TE, mass_TE, ranks=ranks, tile=tile)
        for name, mask_TE in ways.items()
    ]


def mean_outcomes(samples: list[list[Outcome]]) -> list[Outcome]:
    """The mean of every figure of each way over populations, and the worst busiest rank."""
    return [_mean(list(of_one_way)) for of_one_way in zip(*samples, strict=True)]


def _mean(outcomes: list[Outcome]) -> Outcome:
    names = [field.name for field in fields(Outcome) if field.name != "name"]
    means = {name: fmean(getattr(outcome, name) for outcome in outcomes) for name in names}
    means["worst_busiest_over_mean"] = max(o.worst_busiest_over_mean for o in outcomes)
    return Outcome(outcomes[0].name, **means)


def _parts(scores: Scores, ranks: int) -> list[Scores]:
    """The tokens of each rank."""
    names = ["score_TE", "key_TE", "chosen_TE"]
    if scores.allowed_TE is not None:
        names.append("allowed_TE")
    tables = [getattr(scores, name).chunk(ranks) for name in names]
    return [
        replace(scores, **dict(zip(names, parts, strict=True)))
        for parts in zip(*tables, strict=True)
    ]


def _rounded(scores: Scores, rule: str, *, groups: int, tile: int, **capacity: Any) -> Tensor:
    rounding = RoundingConfig(rule, tile=tile, balance_groups=groups, **capacity)
    return round_scores(scores, make_exchange(None), rounding).selected_TE


def _outcome(
    name: str, chosen_TE: Tensor, mask_TE: Tensor, mass_TE: Tensor, *, ranks: int, tile: int
) -> Outcome:
    count_E = mask_TE.sum(0)
    tiles_E = (count_E + tile - 1) // tile
    tiles_P = tiles_E.view(ranks, -1).sum(1)
    rows = int(tiles_E.sum()) * tile
    busiest, mean = int(tiles_P.max()), float(tiles_P.double().mean())
    dropped_TE, added_TE = chosen_TE & ~mask_TE, mask_TE & ~chosen_TE
    pairs, mass = max(int(chosen_TE.sum()), 1), max(int(mass_TE[chosen_TE].sum()), 1)
    return Outcome(
        name=name,
        busiest_tiles=busiest,
        mean_tiles=mean,
        busiest_over_mean=busiest / max(mean, 1e-9),
        worst_busiest_over_mean=busiest / max(mean, 1e-9),
        waste=(rows - int(count_E.sum())) / max(rows, 1),
        dropped=int(dropped_TE.sum()) / pairs,
        added=int(added_TE.sum()) / pairs,
        score_lost=int(mass_TE[dropped_TE].sum()) / mass,
        score_added=int(mass_TE[added_TE].sum()) / mass,
        tokens_without_expert=int((~mask_TE.any(1)).sum()),
    )
