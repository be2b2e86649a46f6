"""Targets of the rounding rules against the oracle, and what balance promises of totals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.registry import ROUNDING_RULES
from distmoe.routing.rounding import may_round_up, reference

# All but the one that weighs scores, which has tests of its own.
ON_COUNTS = [rule for rule in ROUNDING_RULES if rule != "score"]


@st.composite
def counts(draw: st.DrawFn, max_experts: int = 24) -> dict:
    groups = draw(st.sampled_from([1, 2, 3, 4]))
    per_group = draw(st.integers(1, max_experts // groups))
    tile = draw(st.sampled_from([1, 2, 3, 4, 7, 16]))
    num_tokens = draw(st.integers(0, 6 * tile))
    # Often near the number of tokens, which forbids rounding up.
    count = st.one_of(st.integers(0, num_tokens), st.integers(num_tokens // 2, num_tokens))
    freq_E = draw(st.lists(count, min_size=groups * per_group, max_size=groups * per_group))
    return {"freq_E": freq_E, "tile": tile, "room": num_tokens, "groups": groups}


def targets(rule: str, problem: dict) -> Tensor:
    sizes = {name: problem[name] for name in ("tile", "room", "groups")}
    target_E: Tensor = ROUNDING_RULES.load(rule)(torch.tensor(problem["freq_E"]), **sizes)
    return target_E


def may(problem: dict) -> Tensor:
    freq_E = torch.tensor(problem["freq_E"])
    return may_round_up(freq_E, tile=problem["tile"], room=problem["room"])


def busiest(target_E: Tensor, problem: dict) -> int:
    """Tiles of the group with the most."""
    return int((target_E // problem["tile"]).view(problem["groups"], -1).sum(1).max())


@pytest.mark.parametrize("rule", ON_COUNTS)
@given(problem=counts())
@settings(max_examples=150)
def test_equal_to_the_oracle(rule: str, problem: dict) -> None:
    """Whole tiles, less than a tile away, and never more pairs in all than the rule says: buffers
    are that long."""
    got_E = targets(rule, problem)
    assert got_E.dtype == torch.int64
    freq_E, tile, room = (problem[name] for name in ("freq_E", "tile", "room"))
    assert got_E.tolist() == reference.RULES[rule](freq_E, tile, room, problem["groups"])
    most = ROUNDING_RULES.load(rule).most_added(len(freq_E), tile)
    assert int(got_E.sum()) - sum(freq_E) <= most
    if rule != "none":
        assert (got_E % tile == 0).all()
        assert ((got_E - torch.tensor(freq_E)).abs() < tile).all()
        assert (got_E <= room).all()


@pytest.mark.parametrize("tile", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("rule", ["nearest", "balance", "up"])
def test_the_bound_on_added_pairs_is_reached(rule: str, tile: int) -> None:
    """By experts that each lack as much as the rule ever fills; half a tile in all for balance."""
    rest_E = {
        "nearest": [tile // 2 + 1] * 4,
        "balance": [(tile + 1) // 2],
        "up": [1] * 4,
    }[rule]
    freq_E = [rest % tile for rest in rest_E]
    problem = {"freq_E": freq_E, "tile": tile, "room": 2 * tile, "groups": 1}
    most = ROUNDING_RULES.load(rule).most_added(len(freq_E), tile)
    assert int(targets(rule, problem).sum()) - sum(freq_E) == most


@given(problem=counts())
@settings(max_examples=100)
def test_balance_keeps_the_total_within_half_a_tile(problem: dict) -> None:
    """Unless the number of tokens forbids so many experts to round up; then all others do."""
    freq_E, tile = torch.tensor(problem["freq_E"]), problem["tile"]
    target_E = targets("balance", problem)
    wanted = int((2 * (freq_E % tile).sum() + tile) // (2 * tile))
    if wanted <= int(may(problem).sum()):
        assert 2 * abs(int(target_E.sum() - freq_E.sum())) <= tile
    else:
        assert torch.equal(target_E, (freq_E // tile + may(problem)) * tile)


@given(problem=counts())
@settings(max_examples=100)
def test_balance_is_no_heavier_than_nearest_with_as_many_tiles(problem: dict) -> None:
    """With fewer tiles in all, nearest can be lighter: it has dropped the difference."""
    balance_E, nearest_E = targets("balance", problem), targets("nearest", problem)
    if nearest_E.sum() >= balance_E.sum():
        assert busiest(balance_E, problem) <= busiest(nearest_E, problem)


@given(problem=counts(max_experts=12))
@settings(max_examples=150)
def test_balance_reaches_the_optimum(problem: dict) -> None:
    """Over all floor or ceiling choices with as many tiles, none has a lighter busiest run; of
    those as light, none keeps more pairs in the tiles that it rounds up."""
    freq_E, tile, groups = torch.tensor(problem["freq_E"]), problem["tile"], problem["groups"]
    target_E = targets("balance", problem)
    tiles_E = target_E // tile
    floor_E = freq_E // tile
    rest_E = freq_E % tile
    may_E = may(problem)
    wanted = min(int((2 * rest_E.sum() + tile) // (2 * tile)), int(may_E.sum()))
    assert int((tiles_E - floor_E).sum()) == wanted
    best = min(
        (
            int((floor_E + up_E).view(groups, -1).sum(1).max()),
            -int(rest_E[up_E.bool()].sum()),
        )
        for up_E in (
            torch.zeros_like(freq_E).index_fill(0, torch.tensor(ups, dtype=torch.long), 1)
            for ups in itertools.combinations(may_E.nonzero().flatten().tolist(), wanted)
        )
    )
    up_E = tiles_E - floor_E
    assert (
        int(tiles_E.view(groups, -1).sum(1).max()),
        -int(rest_E[up_E.bool()].sum()),
    ) == best


def test_nearest_can_be_lighter_by_dropping_tokens() -> None:
    problem = {"freq_E": [1, 1, 1, 1], "tile": 4, "room": 8, "groups": 2}
    assert targets("nearest", problem).tolist() == [0, 0, 0, 0]
    assert targets("balance", problem).tolist() == [4, 0, 0, 0]


def test_groups_must_divide_the_experts() -> None:
    problem = {"freq_E": [1, 1, 1], "tile": 4, "room": 8, "groups": 2}
    with pytest.raises(ValueError, match="balance_groups is 2; it must divide the 3 experts"):
        targets("balance", problem)


def test_nearest_drops_a_tie() -> None:
    problem = {"freq_E": [4, 5, 12, 13, 3, 0, 8], "tile": 8, "room": 100, "groups": 1}
    assert targets("nearest", problem).tolist() == [0, 8, 8, 16, 0, 0, 8]


def test_the_published_example() -> None:
    """8 ranks, 256 experts, top 8, 2048 tokens a rank: the balanced tiles are level."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.randn(8 * 2048, 256, generator=generator).softmax(1)
    freq_E = choose_top_k(integer_keys(scores_TE), 8).sum(0)
    problem = {"freq_E": freq_E.tolist(), "tile": 128, "room": len(scores_TE), "groups": 8}
    by_rank = targets("balance", problem).view(8, -1).sum(1) // 128
    assert by_rank.tolist() == [128] * 8
    assert int((-(-freq_E // 128)).view(8, -1).sum(1).max()) > 135
