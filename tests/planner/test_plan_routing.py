"""Loads of ranks from an assumed popularity of experts and the config's own rounding."""

from dataclasses import replace

import numpy as np
import pytest

from distmoe.config import MoEConfig, RoundingConfig
from distmoe.moe.schedule import Schedule
from distmoe.planner.cost_model import predict
from distmoe.planner.expert_time import expert_times
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import PRESETS
from distmoe.planner.routing_skew import DRAWN_LAYERS, FloatArray, rank_loads
from distmoe.planner.row_volumes import RankLayout

MOE = MoEConfig(num_experts=64, top_k=8, rounding=RoundingConfig(tile=128))
TOKENS = 4096
PAIRS = TOKENS * MOE.top_k


def loads(rule: str, *, skew: float = 1.5, ep: int = 8, **more: object) -> FloatArray:
    rounding = replace(MOE.rounding, rule=rule, **more)  # type: ignore[arg-type]
    moe = replace(MOE, rounding=rounding)
    return rank_loads(moe, tokens=TOKENS, ep=ep, skew=skew)


@pytest.mark.parametrize("rule", ["balance", "nearest", "down", "up", "stochastic", "score"])
def test_rounded_loads_are_whole_tiles(rule: str) -> None:
    tiles_LP = loads(rule) * PAIRS / MOE.rounding.tile
    assert np.allclose(tiles_LP, tiles_LP.round())
    assert tiles_LP.max() > tiles_LP.min()


def test_balance_levels_even_experts_and_padding_costs() -> None:
    even, padded = loads("balance", skew=1.0), loads("none", skew=1.0)
    # A tile of the 256 of a rank.
    assert even.max() - even.min() <= 2 / 256
    # Half a tile on the 4096 pairs of an expert.
    assert padded.mean() == pytest.approx(1 + 64 / 4096, abs=0.002)


def test_no_rule_levels_popular_experts() -> None:
    """Where one expert of a rank is popular, the mean rank still has its pairs."""
    uneven = loads("balance", skew=2.0)
    assert 1.1 < uneven.max(1).mean() < 2.0
    assert uneven.mean() == pytest.approx(1.0, abs=0.001)
    assert loads("balance", skew=3.0).max(1).mean() > uneven.max(1).mean()
    assert loads("balance", skew=2.0, ep=64).max(1).mean() == pytest.approx(2.0, rel=0.02)
    assert loads("balance", skew=2.0, ep=1).tolist() == [[1.0]] * DRAWN_LAYERS


@pytest.mark.parametrize("rule", ["balance", "up", "none"])
def test_a_capacity_bounds_every_rank(rule: str) -> None:
    """Where a rank has one expert, it has the capacity at the most: 1.25 of 32 tiles."""
    free, bound = (
        loads(rule, skew=3.0, ep=64, capacity_factor=factor).max() for factor in (0.0, 1.25)
    )
    assert free > 2.5
    assert bound == 1.25


def test_a_capacity_of_ranks() -> None:
    """Of 8 experts each: no rank above it, and less is lost than by one of experts."""
    by_expert, by_rank = (
        loads("balance", skew=3.0, capacity_factor=1.25, capacity_of=of)
        for of in ("expert", "rank")
    )
    assert loads("balance", skew=3.0).max() > 1.4
    assert 1.2 < by_rank.max() <= 1.25
    assert by_rank.mean() > 1.03 * by_expert.mean()


def test_each_rank_alone_moves_more() -> None:
    alone = loads("nearest", scope="rank")
    assert np.allclose(alone * PAIRS / 128 % 8, 0)


def test_forced_routing_has_no_skew() -> None:
    moe = replace(MOE, router="balanced")
    found = rank_loads(moe, tokens=TOKENS, ep=8, skew=3.0)
    assert found.shape == (DRAWN_LAYERS, 8)
    assert (found == 1.0).all()


def test_times_follow_the_load() -> None:
    shape = LayerShape(TOKENS, 2048, 768, 64, 8)
    layout, profile, schedule = (
        RankLayout(8, 8),
        PRESETS["NVIDIA H200"],
        Schedule("rank", "tokens", 2),
    )
    loads = {"mean_load": 1.0, "busiest_load": 2.0}
    found = expert_times(shape, layout, profile, schedule, **loads, overlap=True)
    even = predict(shape, layout, profile, schedule)
    assert found.forward.mean_s == even.forward.overlapped_s
    assert found.backward.busy_s == even.backward.busy_s < found.backward.mean_s
    assert 1.8 < found.backward.busiest_s / found.backward.mean_s < 2.0
    serial = expert_times(shape, layout, profile, schedule, **loads, overlap=False)
    assert serial.forward.mean_s == even.forward.serial_s > found.forward.mean_s
    assert found.passes(True) == ([found.forward], [found.forward, found.backward])
    assert found.passes(False) == ([found.forward], [found.backward])
