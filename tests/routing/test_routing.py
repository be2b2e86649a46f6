"""Routing: its order, its inverse index, and what validate() finds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distmoe.routing import Routing


def random_routing(num_tokens: int, num_experts: int, *, seed: int, share: float = 0.4) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    selected_TE = torch.rand(num_tokens, num_experts, generator=generator) < share
    return Routing.from_mask(selected_TE, torch.rand(num_tokens, num_experts, generator=generator))


@given(
    num_tokens=st.integers(0, 20),
    num_experts=st.integers(1, 9),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_mask_gives_a_valid_routing(
    num_tokens: int, num_experts: int, share: float, seed: int
) -> None:
    routing = random_routing(num_tokens, num_experts, seed=seed, share=share)
    routing.validate()
    starts = routing.token_offsets_T1.tolist()
    for token in range(num_tokens):
        own = routing.by_token_N[starts[token] : starts[token + 1]].long()
        assert (routing.token_N[own] == token).all()


def test_pairs_of_a_small_mask() -> None:
    selected_TE = torch.tensor([[True, False, True], [False, False, False], [True, False, False]])
    weight_TE = torch.arange(9.0).view(3, 3)
    routing = Routing.from_mask(selected_TE, weight_TE)
    assert routing.expert_N.tolist() == [0, 0, 2]
    assert routing.token_N.tolist() == [0, 2, 0]
    assert routing.score_N.tolist() == [0.0, 6.0, 2.0]
    assert routing.counts_E.tolist() == [2, 0, 1]
    assert routing.by_token_N.tolist() == [0, 2, 1]
    assert routing.token_offsets_T1.tolist() == [0, 2, 2, 3]
    assert routing.with_scores(weight_TE + 1).score_N.tolist() == [1.0, 7.0, 3.0]


def swapped(x: Tensor) -> Tensor:
    return x[[1, 0, *range(2, len(x))]]


BREAKS = {
    "int32": lambda r: replace(r, counts_E=r.counts_E.long()),
    "fp32": lambda r: replace(r, score_N=r.score_N.double()),
    "one entry a pair": lambda r: replace(r, score_N=r.score_N[1:]),
    "tokens are in range": lambda r: replace(r, num_tokens=r.num_tokens - 1),
    "experts are in range": lambda r: replace(r, num_experts=r.num_experts - 1),
    "by_token_N is in range": lambda r: replace(r, by_token_N=r.by_token_N + 1),
    r"ascend by \(expert, token\)": lambda r: replace(r, token_N=swapped(r.token_N)),
    r"ascends by \(token, expert\)": lambda r: replace(r, by_token_N=swapped(r.by_token_N)),
    "counts_E counts": lambda r: replace(r, counts_E=r.counts_E + 1),
    "starts at 0": lambda r: replace(r, token_offsets_T1=r.token_offsets_T1 + 1),
    "bounds the tokens": lambda r: replace(r, token_offsets_T1=r.token_offsets_T1 * 2),
}


@pytest.mark.parametrize("promise", list(BREAKS))
def test_validate_names_the_broken_promise(promise: str) -> None:
    routing = random_routing(7, 4, seed=0, share=1.0)
    with pytest.raises(AssertionError, match=promise):
        BREAKS[promise](routing).validate()


@pytest.mark.parametrize("spare", [0, 5])
def test_a_tail_behind_the_pairs(spare: int) -> None:
    """The same routing, in longer arrays; gradients reach the pairs and nothing else."""
    generator = torch.Generator().manual_seed(7)
    selected_TE = torch.rand(30, 6, generator=generator) < 0.4
    weight_TE = torch.rand(30, 6, generator=generator).requires_grad_()
    exact = Routing.from_mask(selected_TE, weight_TE)
    longer = Routing.from_mask(selected_TE, weight_TE, max_pairs=len(exact.token_N) + spare)
    longer.validate()
    trimmed = longer.trimmed()
    for name in ("token_N", "expert_N", "score_N", "counts_E", "by_token_N", "token_offsets_T1"):
        assert torch.equal(getattr(trimmed, name), getattr(exact, name)), name
    for routing in (exact, longer, longer.with_scores(weight_TE)):
        # What lies behind may hold anything, and so may its gradient.
        dscore_N = torch.full_like(routing.score_N, float("nan"))
        dscore_N[: len(exact.token_N)] = 2.0
        (gradient,) = torch.autograd.grad(routing.score_N, weight_TE, dscore_N)
        assert torch.equal(gradient, 2.0 * selected_TE)


def test_a_bound_that_is_too_small_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"more than max_pairs \(5\) pairs are selected"):
        Routing.from_mask(torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2), max_pairs=5)
