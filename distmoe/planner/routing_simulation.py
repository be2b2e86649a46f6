"""What rounding does to a routing: tiles of the busiest rank, padding, pairs and score mass moved.

Works on the scores of all tokens of an expert-parallel group in one process, which is exact: the
`exact` selection of P ranks is the rule on their tokens together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distmoe.routing.round_tokens import round_tokens
from distmoe.routing.routers import scores_from_probabilities

TOP_K = "top-k, padded"
LOCAL = "balance, each rank alone"


@dataclass(frozen=True)
class Setting:
    """``tokens`` of one rank; ``tile`` M; ``skew``: standard deviation of the experts' popularity
    in units of that of a token's own taste."""

    tokens: int
    num_experts: int
    top_k: int
    ranks: int
    tile: int
    skew: float = 0.0

    @property
    def tokens_per_expert_over_tile(self) -> float:
        """Mean, over the group."""
        return self.tokens * self.ranks * self.top_k / self.num_experts / self.tile


@dataclass(frozen=True)
class Outcome:
    """Of one way to round. Tiles of a rank are those of its experts; shares are of 1.

    ``waste``: padding rows over the rows that run. ``dropped``, ``added``: pairs over those of
    top-k. ``score_lost``: scores of dropped pairs over those of the top-k pairs.
    """

    name: str
    busiest_tiles: int
    mean_tiles: float
    waste: float
    dropped: float
    added: float
    score_lost: float
    tokens_without_expert: int

    @property
    def busiest_over_mean(self) -> float:
        return self.busiest_tiles / max(self.mean_tiles, 1e-9)


def synthetic_scores(setting: Setting, *, seed: int = 0) -> Tensor:
    """[ranks * tokens, E]: softmax of a token's taste plus the experts' popularity."""
    generator = torch.Generator().manual_seed(seed)
    shape = setting.ranks * setting.tokens, setting.num_experts
    taste_TE = torch.randn(shape, generator=generator)
    popularity_E = torch.randn(setting.num_experts, generator=generator)
    return (taste_TE + setting.skew * popularity_E).softmax(dim=1)


def simulate(setting: Setting, score_TE: Tensor, rules: list[str]) -> Iterator[Outcome]:
    """Top-k with padded tiles, every rule over the group, and `balance` on each rank alone."""
    top_TE = scores_from_probabilities(score_TE, top_k=setting.top_k, renormalize="topk").chosen_TE
    yield _outcome(TOP_K, setting, score_TE, top_TE, top_TE)
    for rule in rules:
        yield _outcome(rule, setting, score_TE, top_TE, _rounded(score_TE, setting, rule))
    parts = [_rounded(part, setting, "balance") for part in torch.split(score_TE, setting.tokens)]
    yield _outcome(LOCAL, setting, score_TE, top_TE, torch.cat(parts))


def _rounded(score_TE: Tensor, setting: Setting, rule: str) -> Tensor:
    routing = round_tokens(
        score_TE, setting.top_k, tile=setting.tile, rule=rule, balance_groups=setting.ranks
    )
    mask_TE = torch.zeros_like(score_TE, dtype=torch.bool)
    mask_TE[routing.token_N.long(), routing.expert_N.long()] = True
    return mask_TE


def _outcome(
    name: str, setting: Setting, score_TE: Tensor, top_TE: Tensor, mask_TE: Tensor
) -> Outcome:
    count_E = mask_TE.sum(0)
    tiles_E = (count_E + setting.tile - 1) // setting.tile
    tiles_P = tiles_E.view(setting.ranks, -1).sum(1)
    rows = int(tiles_E.sum()) * setting.tile
    dropped_TE, added_TE = top_TE & ~mask_TE, mask_TE & ~top_TE
    pairs = int(top_TE.sum())
    return Outcome(
        name=name,
        busiest_tiles=int(tiles_P.max()),
        mean_tiles=float(tiles_P.double().mean()),
        waste=(rows - int(count_E.sum())) / max(rows, 1),
        dropped=int(dropped_TE.sum()) / max(pairs, 1),
        added=int(added_TE.sum()) / max(pairs, 1),
        score_lost=float(score_TE[dropped_TE].sum() / score_TE[top_TE].sum()),
        tokens_without_expert=int((~mask_TE.any(1)).sum()),
    )
