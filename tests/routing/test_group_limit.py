"""Group-limited choice against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.comm import make_exchange
from distmoe.config import ExpertGroups, RoundingConfig
from distmoe.kernels.round_select import NOTHING
from distmoe.registry import ROUTERS
from distmoe.routing.group_limit import GroupLimit
from distmoe.routing.round_tokens import round_scores
from distmoe.routing.routers import make_router

GROUP_SCORES = ("max", "top2", "sum")


def by_loops(
    key_E: list[int], top_k: int, *, groups: int, per_token: int, group_score: str
) -> tuple[list[int], list[int]]:
    """Allowed and chosen experts of a token."""
    size = len(key_E) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    best = {"max": 1, "top2": 2, "sum": math.ceil(top_k / per_token)}[group_score]
    score_G = [sum(sorted((key_E[e] for e in run), reverse=True)[:best]) for run in members]
    taken = sorted(range(groups), key=lambda g: (-score_G[g], g))[:per_token]
    allowed = sorted(e for g in taken for e in members[g])
    return allowed, sorted(sorted(allowed, key=lambda e: (-key_E[e], e))[:top_k])


@st.composite
def problems(draw: st.DrawFn) -> dict:
    groups, size = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    per_token = draw(st.integers(1, groups))
    return {
        "groups": groups,
        "size": size,
        "per_token": per_token,
        "top_k": draw(st.integers(1, per_token * size)),
        "tokens": draw(st.integers(0, 9)),
        # Few levels: ties of experts and of groups.
        "levels": draw(st.sampled_from([1, 2, 3, 1 << 24])),
        "seed": draw(st.integers(0, 999)),
    }


@pytest.mark.parametrize("group_score", GROUP_SCORES)
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_against_loops(group_score: str, problem: dict) -> None:
    generator = torch.Generator().manual_seed(problem["seed"])
    num_experts = problem["groups"] * problem["size"]
    shape = (problem["tokens"], num_experts)
    logits_TE = torch.randint(problem["levels"], shape, generator=generator).float().div(4)
    bias_E = torch.randint(-1, 2, (num_experts,), generator=generator, dtype=torch.int32) << 22
    scores = make_router("sigmoid_topk", top_k=problem["top_k"], renormalize="topk")(
        logits_TE, bias_E
    )
    limit = GroupLimit(
        ExpertGroups(problem["groups"], problem["per_token"]),
        top_k=problem["top_k"],
        group_score=group_score,
    )
    limited = limit(scores)
    for token, key_E in enumerate(scores.key_TE.tolist()):
        allowed, chosen = by_loops(
            key_E,
            problem["top_k"],
            groups=problem["groups"],
            per_token=problem["per_token"],
            group_score=group_score,
        )
        assert limited.allowed_TE is not None
        assert limited.allowed_TE[token].nonzero()[:, 0].tolist() == allowed
        assert limited.chosen_TE[token].nonzero()[:, 0].tolist() == chosen
        want = [key if e in allowed else NOTHING for e, key in enumerate(key_E)]
        assert limited.key_TE[token].tolist() == want
    assert limited.key_TE.dtype == torch.int32
    assert torch.equal(limited.score_TE, scores.score_TE)


@pytest.mark.parametrize("name", list(ROUTERS))
def test_no_router_leaves_the_groups(name: str) -> None:
    logits_TE = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    router = make_router(name, top_k=4, renormalize="topk")
    limit = GroupLimit(ExpertGroups(4, 2), top_k=4, group_score="top2")
    scores = limit(router(logits_TE))
    touched_TG = scores.chosen_TE.view(200, 4, 4).any(2)
    assert int(touched_TG.sum(1).max()) <= 2
    assert scores.chosen_TE.sum(1).tolist() == [4] * 200
    if name == "balanced":
        assert torch.equal(scores.chosen_TE, router(logits_TE).chosen_TE)


def test_rounding_adds_no_pair_that_is_not_allowed() -> None:
    logits_TE = torch.randn(130, 16, generator=torch.Generator().manual_seed(2))
    scores = make_router("softmax_topk", top_k=4, renormalize="topk")(logits_TE)
    limited = GroupLimit(ExpertGroups(4, 2), top_k=4, group_score="max")(scores)
    rounded = round_scores(limited, make_exchange(None), RoundingConfig("up", tile=16))
    assert limited.allowed_TE is not None
    added_TE = rounded.selected_TE & ~limited.chosen_TE
    assert int(added_TE.sum()) > 50
    assert not bool((added_TE & ~limited.allowed_TE).any())
