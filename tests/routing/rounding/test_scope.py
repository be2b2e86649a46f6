"""Rounding of each rank on its own: the rule of one process on every rank's tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.comm import make_exchange
from distmoe.config import RoundingConfig
from distmoe.routing import round_tokens
from distmoe.routing.round_tokens import Rounded, round_scores
from distmoe.routing.routers import scores_from_probabilities

TILE, E, K = 8, 8, 3
SIZES = [40, 0, 33, 50]


@pytest.mark.parametrize("rule", ["balance", "nearest", "down", "score"])
def test_each_rank_alone(rule: str) -> None:
    score_TE = torch.randn(sum(SIZES), E, generator=torch.Generator().manual_seed(3)).softmax(1)
    parts = score_TE.split(SIZES)
    rounding = RoundingConfig(rule, tile=TILE, scope="rank")

    def one(rank: int) -> Rounded:
        scores = scores_from_probabilities(parts[rank], top_k=K, renormalize="topk")
        return round_scores(scores, make_exchange(dist.group.WORLD), rounding)

    results = run_ranks(one, len(SIZES))
    counts_PE = torch.stack([result.selected_TE.sum(0) for result in results])
    assert (counts_PE % TILE == 0).all()
    for rank, result in enumerate(results):
        alone = round_tokens(parts[rank], K, tile=TILE, rule=rule, balance_groups=len(SIZES))
        assert torch.equal(result.selected_TE.sum(0), alone.counts_E.long())
        assert torch.equal(result.selected_TE.T.nonzero()[:, 1], alone.token_N.long())
        assert torch.equal(result.target_E, counts_PE.sum(0))
        own = slice(rank * E // len(SIZES), (rank + 1) * E // len(SIZES))
        assert torch.equal(result.from_ranks_Pe, counts_PE[:, own])
        assert int(result.num_tokens) == sum(SIZES)
