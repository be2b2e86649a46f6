"""The simulation by hand, and what it has to find on any routing."""

from __future__ import annotations

import pytest
import torch

from distmoe.bench.routing_simulation import (
    LOCAL,
    TOP_K,
    Outcome,
    Setting,
    mean_outcomes,
    simulate,
    synthetic_scores,
)
from distmoe.routing.routers import scores_from_probabilities

RULES = ["nearest", "balance", "up", "down", "stochastic"]


def outcomes_of(setting: Setting) -> dict[str, Outcome]:
    outcomes = simulate(synthetic_scores(setting), RULES, ranks=setting.ranks, tile=setting.tile)
    return {outcome.name: outcome for outcome in outcomes}


def test_by_hand() -> None:
    """Two ranks with two tokens and one expert each, tile 2: three tokens like expert 0. It pads
    one row, and so does expert 1. Balance gives both one tile: the weakest third one moves."""
    score_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
    setting = Setting(tokens=2, num_experts=2, top_k=1, ranks=2, tile=2)
    scores = scores_from_probabilities(score_TE, top_k=1, renormalize="topk")
    found = {o.name: o for o in simulate(scores, ["balance"], ranks=2, tile=2)}
    top_k, balance = found[TOP_K], found["balance"]
    assert (top_k.busiest_tiles, top_k.mean_tiles, top_k.waste) == (2, 1.5, 2 / 6)
    assert (balance.busiest_tiles, balance.mean_tiles, balance.waste) == (1, 1.0, 0.0)
    assert (balance.dropped, balance.added) == (1 / 4, 1 / 4)
    assert balance.score_lost == pytest.approx(0.6 / 3.0)
    assert balance.score_added == pytest.approx(0.4 / 3.0)
    assert balance.tokens_without_expert == 0
    assert setting.tokens_per_expert_over_tile == 1.0


@pytest.mark.parametrize("skew", [0.0, 0.3, 1.0])
def test_the_order_of_the_rules(skew: float) -> None:
    setting = Setting(tokens=512, num_experts=64, top_k=4, ranks=4, tile=32, skew=skew)
    found = outcomes_of(setting)
    assert found["balance"].busiest_tiles <= found["nearest"].busiest_tiles
    assert found["nearest"].busiest_tiles < found[TOP_K].busiest_tiles
    assert found["up"].busiest_tiles == found[TOP_K].busiest_tiles
    assert found[TOP_K].waste > 0
    assert all(outcome.waste == 0 for name, outcome in found.items() if name != TOP_K)
    assert found["up"].dropped == found["down"].added == 0
    # A rank alone has a quarter of the tokens: the same tile is four times as coarse.
    moved = {name: outcome.dropped + outcome.added for name, outcome in found.items()}
    assert moved[LOCAL] > 2 * moved["balance"]


def test_a_capacity_bounds_the_busiest_rank() -> None:
    """Two ranks of one expert each, tile 1: all four tokens like expert 0, and two of them, the
    weakest, are dropped."""
    score_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    scores = scores_from_probabilities(score_TE, top_k=1, renormalize="topk")
    outcomes = simulate(scores, ["balance"], ranks=2, tile=1, capacities=[1.0])
    found = {outcome.name: outcome for outcome in outcomes}
    assert found["balance"].busiest_tiles == 4
    assert found["balance, capacity 1 of ranks"].busiest_tiles == 2
    bound = found["balance, capacity 1 of experts"]
    assert (bound.busiest_tiles, bound.dropped, bound.added) == (2, 1 / 2, 0)
    assert bound.score_lost == pytest.approx(1.3 / 3.0)
    assert bound.tokens_without_expert == 2


def test_balance_is_even_where_the_experts_are() -> None:
    setting = Setting(tokens=512, num_experts=64, top_k=4, ranks=4, tile=32)
    assert outcomes_of(setting)["balance"].busiest_over_mean == 1.0


def test_means_over_populations_and_the_worst_of_them() -> None:
    setting = Setting(tokens=64, num_experts=8, top_k=2, ranks=2, tile=8, skew=1.0)
    samples = [
        simulate(synthetic_scores(setting, seed=seed), ["balance"], ranks=2, tile=8)
        for seed in range(3)
    ]
    for way, mean in enumerate(mean_outcomes(samples)):
        of_way = [sample[way] for sample in samples]
        assert {o.name for o in of_way} == {mean.name}
        assert mean.busiest_tiles == pytest.approx(sum(o.busiest_tiles for o in of_way) / 3)
        assert mean.score_lost == pytest.approx(sum(o.score_lost for o in of_way) / 3)
        ratios = [o.busiest_over_mean for o in of_way]
        assert mean.busiest_over_mean == pytest.approx(sum(ratios) / 3)
        assert mean.worst_busiest_over_mean == max(ratios)
