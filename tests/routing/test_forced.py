"""Routers whose choice is forced: what they choose, and that weights and gradients stay real."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.config import RoundingConfig
from distmoe.kernels.round_select import KEY_LIMIT
from distmoe.registry import ROUTERS
from distmoe.routing.round_tokens import round_scores
from distmoe.routing.rounding.reference import splitmix64, top_k_reference
from distmoe.routing.routers import is_forced, make_router

FORCED = ("balanced", "hash")


def make_logits(num_tokens: int, num_experts: int, *, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))


def test_only_these_are_forced() -> None:
    assert {name for name in ROUTERS if is_forced(name)} == set(FORCED)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (10, 3), (7, 7), (64, 6), (5, 1)])
def test_balanced_takes_the_experts_in_turn(num_experts: int, top_k: int) -> None:
    scores = make_router("balanced", top_k=top_k, renormalize="topk")(make_logits(33, num_experts))
    want_TE = torch.zeros(33, num_experts, dtype=torch.bool)
    for token in range(33):
        for j in range(top_k):
            want_TE[token, (token * top_k + j) % num_experts] = True
    assert torch.equal(scores.chosen_TE, want_TE)
    counts_E = scores.chosen_TE.sum(0)
    assert int(counts_E.max() - counts_E.min()) <= 1


def test_hash_is_splitmix64_of_the_bits_of_the_logits() -> None:
    golden = 0x9E3779B97F4A7C15
    logits_TE = make_logits(9, 5)
    scores = make_router("hash", top_k=2, renormalize="topk")(logits_TE)
    for token, bits_E in enumerate(logits_TE.view(torch.int32).tolist()):
        state = splitmix64(sum(splitmix64((e + 1) * golden + b) for e, b in enumerate(bits_E)))
        key_E = [splitmix64(state + (e + 1) * golden) >> 40 for e in range(5)]
        assert scores.key_TE[token].tolist() == key_E
    assert torch.equal(scores.chosen_TE, top_k_reference(scores.key_TE, 2))


def test_hash_spreads_the_tokens_and_looks_at_every_logit() -> None:
    router = make_router("hash", top_k=2, renormalize="topk")
    logits_TE = make_logits(4000, 8)
    counts_E = router(logits_TE).chosen_TE.sum(0)
    # 1000 each; the standard deviation is 27.
    assert int((counts_E - 1000).abs().max()) < 140
    other_TE = logits_TE.clone()
    other_TE[:, 7] += 1e-3
    same = (router(other_TE).chosen_TE == router(logits_TE).chosen_TE).all(1).sum()
    # By chance one of the 28 pairs of experts in 28 tokens.
    assert int(same) < 4000 / 28 * 1.5


@pytest.mark.parametrize("name", FORCED)
def test_weights_are_real_and_keys_follow_the_choice(name: str) -> None:
    logits_TE = make_logits(30, 8).requires_grad_()
    scores = make_router(name, top_k=3, renormalize="none")(logits_TE)
    assert torch.equal(scores.weight(scores.chosen_TE), logits_TE.softmax(1))
    assert scores.prob_TE is scores.score_TE
    least_T = torch.where(scores.chosen_TE, scores.key_TE, KEY_LIMIT).min(1).values
    most_T = torch.where(scores.chosen_TE, -KEY_LIMIT, scores.key_TE).max(1).values
    assert bool((least_T > most_T).all())
    assert int(scores.key_TE.abs().max()) < KEY_LIMIT
    scores.weight(scores.chosen_TE)[:, 0].sum().backward()
    assert logits_TE.grad is not None
    assert int((logits_TE.grad != 0).sum()) > 100


@pytest.mark.parametrize("name", FORCED)
def test_a_bias_is_ignored(name: str) -> None:
    router = make_router(name, top_k=2, renormalize="topk")
    bias_E = torch.full((6,), 2**24, dtype=torch.int32).roll(3) * torch.tensor([1, -1] * 3).int()
    plain, biased = router(make_logits(20, 6)), router(make_logits(20, 6), bias_E)
    assert torch.equal(plain.key_TE, biased.key_TE)
    assert torch.equal(plain.chosen_TE, biased.chosen_TE)


@pytest.mark.parametrize("name", FORCED)
def test_a_forced_choice_can_be_rounded(name: str) -> None:
    scores = make_router(name, top_k=3, renormalize="topk")(make_logits(37, 8))
    rounded = round_scores(scores, make_exchange(None), RoundingConfig("balance", tile=8))
    assert torch.equal(rounded.selected_TE.sum(0), rounded.target_E)
    assert not bool((rounded.target_E % 8).any())
    without = replace(scores, key_TE=torch.zeros_like(scores.key_TE))
    assert torch.equal(
        round_scores(without, make_exchange(None), RoundingConfig("none")).selected_TE,
        scores.chosen_TE,
    )
