"""Rounding on P ranks against the central rule on the concatenated tokens, as integers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from distmoe.registry import ROUNDING_TRANSPORTS
from distmoe.routing import Routing, round_tokens
from distmoe.routing.rounding.reference import RULES, round_all_tokens

RANKS = (1, 2, 4, 8, 16)
# Pieces of the tokens, of which a rank has a run.
PIECES = 16
KINDS = ("random", "few levels", "all equal", "one favourite", "dead experts", "zero or one")


def make_scores(kind: str, num_tokens: int, num_experts: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    if kind == "one favourite":
        logits_TE[:, seed % num_experts] += 20
    if kind == "dead experts":
        logits_TE[:, ::2] -= 40
    if kind == "few levels":
        return (logits_TE.softmax(1) * 4).round() / 4
    if kind == "all equal":
        return torch.full((num_tokens, num_experts), 1 / num_experts)
    if kind == "zero or one":
        return (logits_TE > 0).float()
    return logits_TE.softmax(1)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """Scores of any shape, cut into 16 unequal pieces; fewer ranks hold runs of them."""
    num_experts = draw(st.integers(1, 12))
    piece = st.integers(0, draw(st.sampled_from([0, 2, 6])))
    pieces = draw(st.lists(piece, min_size=PIECES, max_size=PIECES))
    divisors = [g for g in range(1, num_experts + 1) if num_experts % g == 0]
    return {
        "scores_TE": make_scores(
            draw(st.sampled_from(KINDS)), sum(pieces), num_experts, seed=draw(st.integers(0, 999))
        ),
        "pieces": pieces,
        "transport": draw(st.sampled_from(list(ROUNDING_TRANSPORTS))),
        "top_k": draw(st.integers(1, num_experts)),
        "tile": draw(st.sampled_from([1, 2, 3, 4, 8, 16, 128])),
        "groups": draw(st.sampled_from(divisors)),
    }


def mask_of(routing: Routing) -> Tensor:
    mask_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
    mask_TE[routing.token_N.long(), routing.expert_N.long()] = True
    return mask_TE


def rounded_by(num_ranks: int, problem: dict, rule: str) -> list[Routing]:
    """Every rank's routing of its own tokens."""
    per_rank = [sum(run) for run in torch.tensor(problem["pieces"]).view(num_ranks, -1).tolist()]
    own_scores = problem["scores_TE"].split(per_rank)
    num_experts = problem["scores_TE"].shape[1]

    def run(rank: int) -> Routing:
        return round_tokens(
            own_scores[rank],
            problem["top_k"],
            tile=problem["tile"],
            rule=rule,
            group=dist.group.WORLD if num_ranks > 1 else None,
            balance_groups=problem["groups"],
            # Only ranks that share the experts evenly have owners.
            transport="auto" if num_experts % num_ranks else problem["transport"],
        )

    return run_ranks(run, num_ranks)


def ties_across_ranks(tile: int, tokens: int) -> dict:
    """Equal scores everywhere: only the order of the tokens decides."""
    scores_TE = make_scores("all equal", PIECES * tokens, 16, seed=0)
    # Experts 2 and 3 take turns, so that both have chosen and unchosen tokens on every rank.
    scores_TE[::2, 3] += 2**-20
    problem = {"scores_TE": scores_TE, "pieces": [tokens] * PIECES, "top_k": 3}
    return problem | {"tile": tile, "groups": 2, "transport": "owner"}


@pytest.mark.parametrize("rule", [*RULES, "score"])
@given(problem=problems())
@example(problem=ties_across_ranks(8, 3))
@example(problem=ties_across_ranks(16, 5))
@settings(max_examples=15, deadline=None)
def test_every_rank_count_gives_the_pairs_of_the_central_rule(rule: str, problem: dict) -> None:
    _, want_TE = round_all_tokens(
        problem["scores_TE"],
        problem["top_k"],
        tile=problem["tile"],
        rule=rule,
        groups=problem["groups"],
    )
    for num_ranks in RANKS:
        routings = rounded_by(num_ranks, problem, rule)
        assert torch.equal(torch.cat([mask_of(r) for r in routings]), want_TE), num_ranks
        for routing in routings:
            routing.validate()


def test_plain_top_k_without_rounding() -> None:
    scores_TE = make_scores("random", 33, 7, seed=1)
    want_TE = torch.zeros(33, 7, dtype=torch.bool)
    want_TE.scatter_(1, scores_TE.topk(3).indices, True)
    assert torch.equal(mask_of(round_tokens(scores_TE, 3, rule="none")), want_TE)


def test_added_and_dropped_pairs_are_the_nearest_to_the_border() -> None:
    """Expert 0 has 3 of 8 pairs and gains its best other token; expert 1 has 5, loses its worst."""
    first_T = torch.tensor([0.9, 0.8, 0.7, 0.4, 0.3, 0.45, 0.2, 0.1])
    scores_TE = torch.stack([first_T, 1 - first_T], dim=1)
    got = round_tokens(scores_TE, 1, tile=4, rule="nearest")
    # Expert 0: rest 3 rounds up to 4. Expert 1: rest 1 rounds down to 4.
    assert got.expert_N.tolist() == [0] * 4 + [1] * 4
    assert got.token_N.tolist() == [0, 1, 2, 5] + [3, 4, 6, 7]


def test_scores_that_are_not_numbers_keep_the_counts_aligned() -> None:
    """A diverged step must reach the check that skips it, on all ranks alike."""
    scores_TE = make_scores("random", 64, 6, seed=2)
    scores_TE[5], scores_TE[40:50, 3] = float("nan"), float("inf")
    problem = {"scores_TE": scores_TE, "pieces": [4] * PIECES, "top_k": 2}
    problem |= {"tile": 8, "groups": 1, "transport": "all_gather"}
    for num_ranks in RANKS:
        routings = rounded_by(num_ranks, problem, "balance")
        assert (sum(r.counts_E for r in routings) % 8 == 0).all()


def test_impossible_arguments_are_named() -> None:
    scores_TE = torch.rand(4, 6)
    for other in (scores_TE[0], scores_TE.bfloat16(), scores_TE.int()):
        with pytest.raises(ValueError, match=r"scores_TE is .*; it must be torch.float32 \[T, E\]"):
            round_tokens(other, 2)
    for outside in (-0.1, 1.1):
        with pytest.raises(RuntimeError, match=r"outside of \[0, 1\]; .*, not logits"):
            round_tokens(torch.full((4, 6), outside), 2)
    with pytest.raises(ValueError, match="group is 'all'; it must be None or a ProcessGroup"):
        round_tokens(scores_TE, 2, group="all")
    with pytest.raises(ValueError, match=r"top_k is 7; it must be in 1\.\.6"):
        round_tokens(scores_TE, 7)
    with pytest.raises(ValueError, match="balance_groups is 4; it must divide the 6 experts"):
        round_tokens(scores_TE, 2, balance_groups=4)
    with pytest.raises(ValueError, match="unknown rounding rule 'nearst'; known: balance"):
        round_tokens(scores_TE, 2, rule="nearst")
