"""Routers: integer keys, the top-k choice, and the weights of pairs."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.kernels.testing import assert_as_good_as
from distmoe.registry import ROUTERS
from distmoe.routing import round_tokens
from distmoe.routing.rounding.reference import top_k_reference
from distmoe.routing.routers import is_forced, make_router, scores_from_probabilities

REAL = [name for name in ROUTERS if not is_forced(name)]


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


# balanced goes by the place of a token.
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "balanced"])
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


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "sigmoid_topk"])
def test_topk_weights_are_the_softmax_over_the_chosen_logits(name: str) -> None:
    logits_TE = make_logits(50, 16)
    scores = make_router(name, top_k=4, renormalize="topk")(logits_TE)
    hidden_TE = torch.where(scores.chosen_TE, logits_TE, -torch.inf)
    weight_TE = torch.where(scores.chosen_TE, scores.weight(scores.chosen_TE), 0.0)
    exact_TE = hidden_TE.double().softmax(1).float()
    assert_as_good_as(weight_TE, hidden_TE.softmax(1), exact_TE)


def test_sigmoid_scores_weights_and_probabilities() -> None:
    logits_TE = make_logits(50, 16)
    scores = make_router("sigmoid_topk", top_k=4, renormalize="topk")(logits_TE)
    exact_TE = 1 / (1 + (-logits_TE.double()).exp())
    assert_as_good_as(scores.score_TE, logits_TE.sigmoid(), exact_TE.float())
    assert torch.equal(scores.chosen_TE, top_k_reference(integer_keys(scores.score_TE), 4))
    for token in range(50):
        chosen = scores.chosen_TE[token]
        weight = scores.weight(scores.chosen_TE)[token][chosen]
        want = exact_TE[token][chosen] / exact_TE[token][chosen].sum()
        assert weight.tolist() == pytest.approx(want.tolist(), rel=1e-6)
        prob = exact_TE[token] / exact_TE[token].sum()
        assert scores.prob_TE[token].tolist() == pytest.approx(prob.tolist(), rel=1e-6)


def test_probabilities_of_the_balance_loss_have_a_gradient() -> None:
    logits_TE = make_logits(5, 6).requires_grad_()
    same_TE = make_logits(5, 6).double().requires_grad_()
    scores = make_router("sigmoid_topk", top_k=2, renormalize="topk")(logits_TE)
    factor_TE = make_logits(5, 6, seed=1)
    (scores.prob_TE * factor_TE).sum().backward()
    score_TE = same_TE.sigmoid()
    (score_TE / score_TE.sum(1, keepdim=True) * factor_TE).sum().backward()
    assert logits_TE.grad is not None
    assert logits_TE.grad.flatten().tolist() == pytest.approx(
        same_TE.grad.flatten().tolist(), rel=1e-4, abs=1e-7
    )


@pytest.mark.parametrize("name", REAL)
def test_a_bias_moves_the_choice_and_no_weight(name: str) -> None:
    router = make_router(name, top_k=3, renormalize="topk")
    logits_TE = make_logits(40, 8)
    bias_E = torch.tensor([0, 2**24, -(2**24), 5, -7, 2**20, 0, 1], dtype=torch.int32)
    plain, biased = router(logits_TE), router(logits_TE, bias_E)
    assert torch.equal(biased.key_TE.long(), plain.key_TE.long() + bias_E.long())
    assert torch.equal(biased.chosen_TE, top_k_reference(biased.key_TE, 3))
    assert bool(biased.chosen_TE[:, 1].all())
    assert not bool(biased.chosen_TE[:, 2].any())
    assert torch.equal(biased.score_TE, plain.score_TE)
    total_T1 = (plain.score_TE * biased.chosen_TE).sum(1, keepdim=True)
    want_TE = plain.score_TE / total_T1
    assert_as_good_as(biased.weight(biased.chosen_TE), want_TE, want_TE.double().float())


def test_scale_is_a_factor_on_every_weight() -> None:
    logits_TE = make_logits(20, 8)
    scores = make_router("softmax_topk", top_k=3, renormalize="assigned")(logits_TE)
    scaled = replace(scores, scale=2.5)
    assert torch.equal(scaled.weight(scores.chosen_TE), scores.weight(scores.chosen_TE) * 2.5)


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


@pytest.mark.parametrize("renormalize", ["topk", "assigned", "none"])
def test_weights_and_their_gradient_through_kept_and_added_pairs(renormalize: str) -> None:
    """Against finite differences in fp64, with the choice held fixed."""
    generator = torch.Generator().manual_seed(5)
    logits_TE = torch.randn(24, 6, generator=generator)
    objective_TE = torch.randn(24, 6, generator=generator)
    scores_TE = logits_TE.softmax(1).requires_grad_()
    routing = round_tokens(scores_TE, 2, tile=8, rule="nearest", renormalize=renormalize)
    token_N, expert_N = routing.token_N.long(), routing.expert_N.long()
    chosen_TE = choose_top_k(integer_keys(scores_TE), 2)
    assert not chosen_TE[token_N, expert_N].all(), "no pair was added"
    selected_TE = torch.zeros_like(chosen_TE)
    selected_TE[token_N, expert_N] = True
    assert selected_TE.any(1).all(), "a token without experts has no sum to divide by"
    (routing.score_N * objective_TE[token_N, expert_N]).sum().backward()

    def value(scores: Tensor) -> Tensor:
        weight = scores
        if renormalize != "none":
            counted_TE = chosen_TE if renormalize == "topk" else selected_TE
            weight = scores / torch.where(counted_TE, scores, 0).sum(1, keepdim=True)
        return (weight[token_N, expert_N] * objective_TE[token_N, expert_N]).sum()

    exact = scores_TE.detach().double()
    for token, expert in itertools.product(range(24), range(6)):
        step = torch.zeros_like(exact)
        step[token, expert] = 1e-6
        slope = (value(exact + step) - value(exact - step)) / 2e-6
        assert scores_TE.grad[token, expert] == pytest.approx(float(slope), rel=1e-4, abs=1e-5)


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
