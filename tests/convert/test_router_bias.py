"""Biases of scores as integers: the same choice, whatever all of them have in common."""

import pytest
import torch
from torch import Tensor

from distmoe.config import ExpertGroups
from distmoe.convert.router_bias import bias_from_hf, bias_problem, bias_to_hf
from distmoe.routing.group_limit import GroupLimit
from distmoe.routing.routers import make_router

T, E, K = 200, 16, 4
LOGITS_TE = torch.randn(T, E, generator=torch.Generator().manual_seed(0))
# Even numbers of units, so that half of a sum of two is one.
BIAS_E = torch.randint(-1 << 22, 1 << 22, (E,), generator=torch.Generator().manual_seed(1)) * 2


def chosen(bias_E: Tensor) -> Tensor:
    """By the two best of four groups, of which a token may use two."""
    scores = make_router("sigmoid_topk", top_k=K, renormalize="topk")(LOGITS_TE, bias_E)
    return GroupLimit(ExpertGroups(4, 2), top_k=K, group_score="top2")(scores).chosen_TE


def test_ours_come_back_bit_for_bit() -> None:
    bias_E = BIAS_E.int()
    assert torch.equal(bias_from_hf(bias_to_hf(bias_E)), bias_E)


@pytest.mark.parametrize("offset", [-3.0, 6.8125, 34.5])
def test_what_all_experts_have_in_common_changes_no_choice(offset: float) -> None:
    moved_E = bias_from_hf(bias_to_hf(BIAS_E.int()).double() + offset)
    assert moved_E.max() == -moved_E.min()
    difference_E = moved_E - BIAS_E
    assert (difference_E == difference_E[0]).all()
    assert torch.equal(chosen(moved_E), chosen(BIAS_E.int()))
    assert not torch.equal(chosen(moved_E), chosen(torch.zeros(E, dtype=torch.int32)))


def test_biases_that_our_range_cannot_hold_are_refused() -> None:
    assert bias_problem(torch.tensor([9.0, 11.0])) == ""
    assert bias_problem(torch.tensor([9.0, 11.5])) == (
        "has biases from 9 to 11.5; they must be at most 2 apart"
    )
    assert bias_problem(torch.tensor([0.0, float("nan")])) != ""
