"""Targets of the rounding rules against the oracle, and what balance promises of totals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

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
@settings(max_examples=200, deadline=None)
def test_equal_to_the_oracle(rule: str, problem: dict) -> None:
    got_E = targets(rule, problem)
    assert got_E.dtype == torch.int64
    arguments = [problem[name] for name in ("freq_E", "tile", "room", "groups")]
    want_E = reference.RULES[rule](*arguments)
    assert got_E.tolist() == want_E


@pytest.mark.parametrize("rule", ON_COUNTS)
@given(problem=counts())
@settings(max_examples=200, deadline=None)
def test_no_rule_adds_more_pairs_than_it_says(rule: str, problem: dict) -> None:
    """Buffers are that long; a pair beyond them would be lost."""
    most = ROUNDING_RULES.load(rule).most_added(len(problem["freq_E"]), problem["tile"])
    assert int(targets(rule, problem).sum()) - sum(problem["freq_E"]) <= most


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
@settings(max_examples=300, deadline=None)
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
@settings(max_examples=300, deadline=None)
def test_balance_is_no_heavier_than_nearest_with_as_many_tiles(problem: dict) -> None:
    """With fewer tiles in all, nearest can be lighter: it has dropped the difference."""
    balance_E, nearest_E = targets("balance", problem), targets("nearest", problem)
    if nearest_E.sum() >= balance_E.sum():
        assert busiest(balance_E, problem) <= busiest(nearest_E, problem)


def test_nearest_can_be_lighter_by_dropping_tokens() -> None:
    problem = {"freq_E": [1, 1, 1, 1], "tile": 4, "room": 8, "groups": 2}
    assert targets("nearest", problem).tolist() == [0, 0, 0, 0]
    assert targets("balance", problem).tolist() == [4, 0, 0, 0]


def test_groups_must_divide_the_experts() -> None:
    problem = {"freq_E": [1, 1, 1], "tile": 4, "room": 8, "groups": 2}
    with pytest.raises(ValueError, match="balance_groups is 2; it must divide the 3 experts"):
        targets("balance", problem)
