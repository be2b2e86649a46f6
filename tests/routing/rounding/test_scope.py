"""Rounding of each rank on its own: the rule of one process on every rank's tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.comm import make_exchange
from distmoe.config import ExpertGroups, RoundingConfig
from distmoe.registry import ROUNDING_RULES
from distmoe.routing import round_tokens
from distmoe.routing.group_limit import GroupLimit
from distmoe.routing.round_tokens import Rounded, round_scores
from distmoe.routing.routers import Scores, scores_from_probabilities

TILE, E, K = 8, 8, 3
SIZES = [40, 0, 33, 50]
LIMIT = GroupLimit(ExpertGroups(4, 2), top_k=K, group_score="max")


def scores_of_ranks(*, limited: bool) -> list[Scores]:
    score_TE = torch.randn(sum(SIZES), E, generator=torch.Generator().manual_seed(3)).softmax(1)
    parts = [
        scores_from_probabilities(part_TE, top_k=K, renormalize="topk")
        for part_TE in score_TE.split(SIZES)
    ]
    return [LIMIT(part) for part in parts] if limited else parts


def on_ranks(parts: list[Scores], rounding: RoundingConfig) -> list[Rounded]:
    def one(rank: int) -> Rounded:
        return round_scores(parts[rank], make_exchange(dist.group.WORLD), rounding)

    return run_ranks(one, len(SIZES))


def check_facts(results: list[Rounded]) -> None:
    """What every rank is told of the others."""
    counts_PE = torch.stack([result.selected_TE.sum(0) for result in results])
    for rank, result in enumerate(results):
        assert torch.equal(result.target_E, counts_PE.sum(0))
        own = slice(rank * E // len(SIZES), (rank + 1) * E // len(SIZES))
        assert torch.equal(result.from_ranks_Pe, counts_PE[:, own])
        assert int(result.num_tokens) == sum(SIZES)


@pytest.mark.parametrize("rule", list(ROUNDING_RULES))
def test_each_rank_alone(rule: str) -> None:
    parts = scores_of_ranks(limited=False)
    results = on_ranks(parts, RoundingConfig(rule, tile=TILE, scope="rank"))
    check_facts(results)
    for part, result in zip(parts, results, strict=True):
        assert rule == "none" or not (result.selected_TE.sum(0) % TILE).any()
        alone = round_tokens(part.score_TE, K, tile=TILE, rule=rule, balance_groups=len(SIZES))
        assert torch.equal(result.selected_TE.sum(0), alone.counts_E.long())
        assert torch.equal(result.selected_TE.T.nonzero()[:, 1], alone.token_N.long())


@pytest.mark.parametrize("rule", list(ROUNDING_RULES))
def test_each_rank_alone_within_the_groups_of_its_tokens(rule: str) -> None:
    parts = scores_of_ranks(limited=True)
    results = on_ranks(parts, RoundingConfig(rule, tile=TILE, scope="rank"))
    check_facts(results)
    rounding = RoundingConfig(rule, tile=TILE, balance_groups=len(SIZES))
    for part, result in zip(parts, results, strict=True):
        assert rule == "none" or not (result.selected_TE.sum(0) % TILE).any()
        assert not (result.selected_TE & ~part.allowed_TE).any()
        alone = round_scores(part, make_exchange(None), rounding)
        assert torch.equal(result.selected_TE, alone.selected_TE)
