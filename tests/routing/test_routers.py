"""Routers: integer keys, the top-k choice, and the weights of pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.kernels.testing import assert_as_good_as
from distmoe.registry import ROUTERS
from distmoe.routing.rounding.reference import top_k_reference
from distmoe.routing.routers import make_router, scores_from_probabilities


def make_logits(num_tokens: int, num_experts: int, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(0, 12), num_experts=st.integers(1, 9), levels=st.integers(1, 4), data=st.data()
)
@settings(max_examples=100, deadline=None)
def test_ties_go_to_the_lower_expert(
    rows: int, num_experts: int, levels: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(rows * num_experts)
    key_TE = torch.randint(levels, (rows, num_experts), generator=generator, dtype=torch.int32)
    top_k = data.draw(st.integers(1, num_experts))
    assert torch.equal(choose_top_k(key_TE, top_k), top_k_reference(key_TE, top_k))


def test_keys_are_the_floor_in_units_of_two_to_the_minus_24() -> None:
    unit = 2.0**-24
    score_TE = torch.tensor([[0.0, unit, 1.0, 1 - unit, 0.25, unit * 0.99, 3.5 * unit]])
    assert integer_keys(score_TE).tolist() == [[0, 1, 2**24, 2**24 - 1, 2**22, 0, 3]]
    assert integer_keys(score_TE).dtype == torch.int32
    odd_TE = torch.tensor([[float("nan"), float("inf"), -1.0, 7.0]])
    assert integer_keys(odd_TE).tolist() == [[0, 2**24, 0, 2**24]]


@pytest.mark.parametrize("name", list(ROUTERS))
def test_decisions_do_not_depend_on_the_cut(name: str) -> None:
    router = make_router(name, top_k=3, renormalize="topk")
    logits_TE = make_logits(101, 24)
    whole = router(logits_TE)
    for size in (1, 2, 7, 64):
        parts = [router(part) for part in logits_TE.split(size)]
        assert torch.equal(torch.cat([p.key_TE for p in parts]), whole.key_TE)
        assert torch.equal(torch.cat([p.chosen_TE for p in parts]), whole.chosen_TE)
        weights = torch.cat([p.weight(p.chosen_TE) for p in parts])
        assert torch.equal(weights, whole.weight(whole.chosen_TE))


@pytest.mark.parametrize("name", list(ROUTERS))
def test_topk_weights_are_the_softmax_over_the_chosen_logits(name: str) -> None:
    logits_TE = make_logits(50, 16)
    scores = make_router(name, top_k=4, renormalize="topk")(logits_TE)
    hidden_TE = torch.where(scores.chosen_TE, logits_TE, -torch.inf)
    weight_TE = torch.where(scores.chosen_TE, scores.weight(scores.chosen_TE), 0.0)
    exact_TE = hidden_TE.double().softmax(1).float()
    assert_as_good_as(weight_TE, hidden_TE.softmax(1), exact_TE)


def test_weights_by_renormalisation_with_an_added_and_a_dropped_pair() -> None:
    score_TE = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    selected_TE = torch.tensor([[True, False, True, False]])

    def weights_by(renormalize: str) -> list[float]:
        scores = scores_from_probabilities(score_TE, top_k=2, renormalize=renormalize)
        weights: list[float] = scores.weight(selected_TE)[selected_TE].tolist()
        return weights

    assert weights_by("none") == [0.5, 0.125]
    # Chosen are 0 and 1: the scale stays theirs.
    assert weights_by("topk") == pytest.approx([0.5 / 0.75, 0.125 / 0.75])
    assert weights_by("assigned") == pytest.approx([0.8, 0.2])


def test_a_token_that_lost_all_its_experts_has_finite_gradients() -> None:
    score_TE = torch.tensor([[0.6, 0.4], [0.3, 0.7]], requires_grad=True)
    scores = scores_from_probabilities(score_TE, top_k=1, renormalize="assigned")
    selected_TE = torch.tensor([[False, False], [True, True]])
    scores.weight(selected_TE)[selected_TE].sum().backward()
    assert score_TE.grad is not None
    assert torch.isfinite(score_TE.grad).all()


def test_topk_softmax_refuses_another_normalisation() -> None:
    with pytest.raises(ValueError, match="renormalize is 'none'.*must be 'topk'"):
        make_router("topk_softmax", top_k=2, renormalize="none")
