"""How uneven the ranks of an ep group are: experts of different popularity, and what rounding makes
of their counts.

The popularity of a layer's experts is log-normal, as wide as the busiest expert over the mean says.
Pairs are drawn from it. The config's own capacity and rounding rule turn them into the pairs that
run; without a rule tiles are padded.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from distmoe.config import MoEConfig, RoundingConfig
from distmoe.registry import ROUNDING_RULES
from distmoe.routing.rounding.capacity import capacity

FloatArray = NDArray[np.float64]

HALVINGS = 40
WIDEST = 8.0
DRAWN_LAYERS = 8


def rank_loads(moe: MoEConfig, *, tokens: int, ep: int, skew: float) -> FloatArray:
    """[DRAWN_LAYERS, ep]: pairs that a rank runs, padding of tiles among them, over the mean pairs
    of a rank under top-k. ``tokens`` of each rank; ``skew``: the busiest expert over the mean, in
    the mean over layers, at least 1. A forced `balanced` router has even experts."""
    rng = np.random.default_rng(0)
    forced = moe.router == "balanced"
    popularity_LE = _popularity(moe.num_experts, 1.0 if forced else skew)
    pairs, share_LE = tokens * ep * moe.top_k, popularity_LE / moe.num_experts
    pairs_LE = pairs * share_LE if forced else rng.multinomial(pairs, share_LE)
    pairs_LE = np.minimum(pairs_LE.round(), tokens * ep).astype(np.float64)
    run_LE = np.stack([_run(freq_E, moe.rounding, tokens, ep) for freq_E in pairs_LE])
    return np.asarray(run_LE.reshape(DRAWN_LAYERS, ep, -1).sum(2) / (tokens * moe.top_k))


@cache
def _popularity(num_experts: int, skew: float) -> FloatArray:
    """[L, E], mean 1 in every layer."""
    taste_LE = np.random.default_rng(1).standard_normal((DRAWN_LAYERS, num_experts))
    low, high = 0.0, WIDEST
    # exp(width * taste) has no width for a given maximum in closed form.
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        busiest = float(_shares(taste_LE, middle).max(1).mean())
        low, high = (middle, high) if busiest < skew else (low, middle)
    return _shares(taste_LE, low)


def _shares(taste_LE: FloatArray, width: float) -> FloatArray:
    weight_LE = np.exp(width * taste_LE)
    return np.asarray(weight_LE / weight_LE.mean(1, keepdims=True))


def _run(freq_E: FloatArray, rounding: RoundingConfig, tokens: int, ep: int) -> FloatArray:
    """Pairs that run, tiles full."""
    tile, populations = rounding.tile, ep if rounding.scope == "rank" else 1
    freq = torch.from_numpy(freq_E / populations).round().long()
    if rounding.capacity_factor:
        freq = freq.minimum(capacity(freq, rounding, groups=rounding.balance_groups or ep))
    if rounding.rule == "none":
        return np.asarray(np.ceil(freq.numpy() * populations / tile) * tile)
    # `score` weighs scores, which a plan has not; in the mean it rounds up as `stochastic` does.
    rule = ROUNDING_RULES.load("stochastic" if rounding.rule == "score" else rounding.rule)
    target_E = rule(
        freq,
        tile=tile,
        room=tokens * ep // populations,
        groups=rounding.balance_groups or ep,
        seed=rounding.seed,
    )
    return np.asarray(target_E.numpy() * populations, dtype=np.float64)
