"""The draws of the stochastic rule: unbiased, repeatable, and different for another seed."""

from __future__ import annotations

import torch

from distmoe.registry import ROUNDING_RULES
from distmoe.routing.rounding import reference
from distmoe.routing.rounding.stochastic import draw

TILE, TOKENS = 16, 10_000


def targets(freq_E: torch.Tensor, seed: int) -> torch.Tensor:
    rule = ROUNDING_RULES.load("stochastic")
    target_E: torch.Tensor = rule(freq_E, tile=TILE, room=TOKENS, groups=1, seed=seed)
    return target_E


def test_the_mean_count_is_that_of_top_k() -> None:
    """2,000 seeds: the mean moves by less than five of its standard errors."""
    freq_E = torch.arange(32) * 9
    mean_E = torch.stack([targets(freq_E, seed) for seed in range(2000)]).double().mean(0)
    share_E = (freq_E % TILE) / TILE
    error_E = TILE * (share_E * (1 - share_E) / 2000).sqrt()
    assert ((mean_E - freq_E).abs() <= 5 * error_E).all()


def test_experts_are_drawn_independently() -> None:
    """All counts half a tile over: how many of 64 go up varies as coins do."""
    ups = torch.stack([targets(torch.full((64,), 8), seed) for seed in range(1000)]) > 8
    variance = float(ups.sum(1).double().var())
    assert 0.8 * 16 < variance < 1.2 * 16


def test_seed_and_counts_decide() -> None:
    freq_E = torch.arange(64)
    assert torch.equal(targets(freq_E, 3), targets(freq_E, 3))
    assert not torch.equal(targets(freq_E, 3), targets(freq_E, 4))
    other_E = freq_E.clone()
    other_E[0] += TILE
    assert not torch.equal(targets(freq_E, 3)[1:], targets(other_E, 3)[1:])


def test_any_seed_is_the_one_of_the_oracle() -> None:
    freq_E = torch.arange(20) * 7
    for seed in (0, 1, 2**31, 2**62):
        want = reference.stochastic(freq_E.tolist(), TILE, TOKENS, 1, seed)
        assert targets(freq_E, seed).tolist() == want
    assert int(draw(freq_E, 5).min()) >= 0
