"""A bound on the pairs of every expert, over any number of ranks, against loops over all tokens."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.config import ExpertGroups, RoundingConfig
from distmoe.kernels.round_select import KEY_LIMIT
from distmoe.registry import ROUNDING_RULES
from distmoe.routing import round_tokens
from distmoe.routing.group_limit import GroupLimit
from distmoe.routing.round_tokens import Rounded, round_scores
from distmoe.routing.rounding.capacity import capacity
from distmoe.routing.rounding.quota import shares
from distmoe.routing.rounding.reference import capped, round_all_tokens, select_reference
from distmoe.routing.routers import Scores, scores_from_probabilities

RANKS = (1, 2, 3, 4, 8)
KINDS = ("random", "few levels", "all equal", "one favourite", "half favoured")
FACTORS = (1.0, 1.1, 1.3333333333333333, 2.5, 100.0)


def make_scores(kind: str, num_tokens: int, num_experts: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts, generator=generator)
    if kind == "one favourite":
        logits_TE[:, seed % num_experts] += 20
    if kind == "half favoured":
        logits_TE[:, ::2] += 2
    if kind == "few levels":
        return (logits_TE.softmax(1) * 4).round() / 4
    if kind == "all equal":
        return torch.full((num_tokens, num_experts), 1 / num_experts)
    return logits_TE.softmax(1)


@st.composite
def problems(draw: st.DrawFn) -> dict:
    sizes = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    sizes = sizes[: max(p for p in RANKS if p <= len(sizes))]
    num_experts = draw(st.integers(1, 12))
    kind, seed = draw(st.sampled_from(KINDS)), draw(st.integers(0, 999))
    return {
        "scores_TE": make_scores(kind, sum(sizes), num_experts, seed=seed),
        "sizes": sizes,
        "top_k": draw(st.integers(1, num_experts)),
        "tile": draw(st.sampled_from([1, 2, 3, 8, 16])),
        "groups": draw(st.sampled_from([g for g in range(1, 13) if num_experts % g == 0])),
        "factor": draw(st.sampled_from(FACTORS)),
        "of": draw(st.sampled_from(["expert", "rank"])),
    }


def on_ranks(problem: dict, rule: str, selection: str) -> list[Rounded]:
    scores = [
        scores_from_probabilities(part_TE, top_k=problem["top_k"], renormalize="topk")
        for part_TE in problem["scores_TE"].split(problem["sizes"])
    ]
    rounding = RoundingConfig(
        rule,
        tile=problem["tile"],
        selection=selection,
        balance_groups=problem["groups"],
        capacity_factor=problem["factor"],
        capacity_of=problem["of"],
    )
    return rounded_on_ranks(scores, rounding)


def rounded_on_ranks(scores: list[Scores], rounding: RoundingConfig) -> list[Rounded]:
    """Of every rank, with its own scores."""

    def run(rank: int) -> Rounded:
        exchange = make_exchange(dist.group.WORLD if len(scores) > 1 else None)
        return round_scores(scores[rank], exchange, rounding)

    return run_ranks(run, len(scores))


def masks(results: list[Rounded]) -> Tensor:
    return torch.cat([rounded.selected_TE for rounded in results])


@pytest.mark.parametrize("rule", list(ROUNDING_RULES))
@given(problem=problems())
@settings(max_examples=12, deadline=None, derandomize=True)
def test_every_rank_count_gives_the_pairs_of_the_oracle(rule: str, problem: dict) -> None:
    chosen_TE, want_TE = round_all_tokens(
        problem["scores_TE"],
        problem["top_k"],
        tile=problem["tile"],
        rule=rule,
        groups=problem["groups"],
        capacity_factor=Fraction(problem["factor"]).limit_denominator(10_000),
        capacity_runs=problem["groups"] if problem["of"] == "rank" else 0,
    )
    results = on_ranks(problem, rule, "exact")
    assert torch.equal(masks(results), want_TE)
    num_experts, num_ranks = want_TE.shape[1], len(results)
    for rank, rounded in enumerate(results):
        assert torch.equal(rounded.freq_E, chosen_TE.sum(0))
        assert torch.equal(rounded.target_E, want_TE.sum(0))
        assert int(rounded.selected_TE.sum()) <= rounded.max_pairs
        if num_experts % num_ranks == 0:
            own = slice(rank * num_experts // num_ranks, (rank + 1) * num_experts // num_ranks)
            by_source_PE = torch.stack([part.sum(0) for part in want_TE.split(problem["sizes"])])
            assert torch.equal(rounded.from_ranks_Pe, by_source_PE[:, own])


@pytest.mark.parametrize("rule", ["none", "nearest", "balance"])
@given(problem=problems())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_quotas_have_the_counts_of_the_oracle(rule: str, problem: dict) -> None:
    """Every rank drops its share, its own lowest keys; where nothing else changes, only those."""
    results = on_ranks(problem, rule, "quota")
    exact = on_ranks(problem, rule, "exact")
    assert torch.equal(results[0].target_E, exact[0].target_E)
    assert torch.equal(masks(results).sum(0), exact[0].target_E)
    num_experts, num_ranks = len(exact[0].target_E), len(results)
    if num_experts % num_ranks == 0:
        by_source_PE = torch.stack([rounded.selected_TE.sum(0) for rounded in results])
        by_owner = torch.stack([rounded.from_ranks_Pe for rounded in results], 1)
        assert torch.equal(by_owner.view(num_ranks, num_experts), by_source_PE)
    if rule != "none":
        return
    parts = problem["scores_TE"].split(problem["sizes"])
    scores = [
        scores_from_probabilities(part, top_k=problem["top_k"], renormalize="topk")
        for part in parts
    ]
    counts_PE = torch.stack([one.chosen_TE.sum(0) for one in scores])
    left_PE = counts_PE - shares(counts_PE, counts_PE.sum(0) - exact[0].target_E)
    for one, rounded, left_E in zip(scores, results, left_PE, strict=True):
        want_TE = select_reference(one.key_TE, one.chosen_TE, left_E)
        assert torch.equal(rounded.selected_TE, want_TE)


@pytest.mark.parametrize(
    ("freq", "factor", "rule", "tile", "most"),
    [
        # Mean 10.
        ([40, 0, 0, 0], 1.0, "none", 4, 10),
        ([40, 0, 0, 0], 1.0, "balance", 4, 12),
        ([40, 0, 0, 0], 1.2, "balance", 4, 12),
        ([40, 0, 0, 0], 1.25, "balance", 4, 16),
        # A tenth has no binary fraction, and is not rounded up.
        ([100, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1.1, "none", 1, 11),
        ([200] + [90] * 9, 1.0, "none", 1, 101),
        ([200] + [89] * 9, 1.0, "none", 1, 101),
        # Less than a tile in the mean: one tile.
        ([3, 1, 0, 0], 1.0, "nearest", 128, 128),
        ([0, 0, 0, 0], 2.0, "nearest", 128, 0),
        ([2**33, 0, 0, 2**33], 1e300, "none", 1, 2**33),
    ],
)
def test_the_tiles_that_hold_the_factor(
    freq: list[int], factor: float, rule: str, tile: int, most: int
) -> None:
    rounding = RoundingConfig(rule, tile=tile, capacity_factor=factor)
    assert int(capacity(torch.tensor(freq), rounding, groups=1)[0]) == most


def test_a_rank_fills_its_tiles_from_the_emptiest_expert() -> None:
    """Five tiles a rank, 1.25 of a mean of four. The first has ten: one for each of its experts,
    and one more for the fullest."""
    freq_E = torch.tensor([4, 29, 30, 1, 0, 8, 0, 8, 8, 8, 0, 0])
    rounding = RoundingConfig("up", tile=8, capacity_factor=1.25, capacity_of="rank")
    most_E = capacity(freq_E, rounding, groups=3)
    assert most_E.view(3, 4).tolist() == [[8, 8, 16, 8], [0, 8, 0, 8], [8, 8, 0, 0]]
    with pytest.raises(ValueError, match="balance_groups is 5; it must divide the 12 experts"):
        capacity(freq_E, rounding, groups=5)


@pytest.mark.parametrize("rule", ["none", "up", "balance"])
def test_no_rank_has_more_tiles_than_its_capacity(rule: str) -> None:
    """And it drops less than a capacity of every expert."""
    scores_TE = make_scores("half favoured", 400, 16, seed=2)
    tile = 1 if rule == "none" else 8
    budget = -(-5 * 400 * 3 // (4 * 4 * tile))
    kept = {}
    for of in ("rank", "expert"):
        counts_E = round_tokens(
            scores_TE, 3, tile=8, rule=rule, balance_groups=4, capacity_factor=1.25, capacity_of=of
        ).counts_E
        assert int(counts_E.view(4, 4).sum(1).max()) <= budget * tile
        kept[of] = int(counts_E.sum())
    assert kept["rank"] > 1.1 * kept["expert"]


def test_the_busiest_rank_of_balance() -> None:
    """One expert has 15 of 32 tiles. With a capacity of 1.25 times the mean of 4 it has 5, and the
    tiles that are left are level."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(128, 8, generator=generator)
    logits_TE[:, 3] += 3
    tiles = {
        factor: round_tokens(
            logits_TE.softmax(1), 2, tile=8, balance_groups=4, capacity_factor=factor
        ).counts_E
        // 8
        for factor in (0.0, 1.25)
    }
    assert [int(tiles_E[3]) for tiles_E in tiles.values()] == [15, 5]
    by_rank = {f: tiles_E.view(4, 2).sum(1).tolist() for f, tiles_E in tiles.items()}
    assert by_rank == {0.0: [5, 16, 6, 5], 1.25: [5, 6, 6, 5]}


def test_groups_and_a_bias() -> None:
    """Keys with a bias may be negative, and pairs outside of a token's groups stay outside."""
    scores_TE = make_scores("half favoured", 60, 8, seed=5)
    key_TE = (scores_TE * 2**24).int() + torch.tensor([-(2**25), 2**22] * 4, dtype=torch.int32)
    scores = replace(scores_from_probabilities(scores_TE, top_k=3, renormalize="topk"))
    scores = GroupLimit(ExpertGroups(4, 2), top_k=3, group_score="max")(
        replace(scores, key_TE=key_TE)
    )
    want_TE = capped(scores.key_TE, scores.chosen_TE, Fraction(1), 1, 8)
    assert int(want_TE.sum()) < int(scores.chosen_TE.sum())
    parts = [
        replace(scores, key_TE=key, chosen_TE=chosen, allowed_TE=allowed)
        for key, chosen, allowed in zip(
            *(
                x.split([20, 0, 33, 7])
                for x in (scores.key_TE, scores.chosen_TE, scores.allowed_TE)
            ),
            strict=True,
        )
    ]
    for rule in ("none", "nearest"):
        results = rounded_on_ranks(parts, RoundingConfig(rule, tile=1, capacity_factor=1.0))
        assert torch.equal(masks(results), want_TE)
    tiles = rounded_on_ranks(parts, RoundingConfig("up", tile=8, capacity_factor=1.0))
    assert not (masks(tiles) & ~scores.allowed_TE).any()
    assert int(tiles[0].target_E.max()) <= 24


@pytest.mark.parametrize("key", [-KEY_LIMIT, KEY_LIMIT - 1])
def test_keys_at_their_limits(key: int) -> None:
    scores = scores_from_probabilities(torch.full((6, 2), 0.5), top_k=1, renormalize="topk")
    scores = replace(scores, key_TE=torch.full((6, 2), key, dtype=torch.int32))
    (rounded,) = rounded_on_ranks([scores], RoundingConfig("none", capacity_factor=1.0))
    assert rounded.selected_TE[:, 0].tolist() == [True] * 3 + [False] * 3


def test_each_rank_alone() -> None:
    """Scope rank: the capacity is of each rank's own tokens, as if it were the only one."""
    scores_TE, sizes = make_scores("half favoured", 90, 8, seed=1), [20, 0, 70]
    parts = [
        scores_from_probabilities(part, top_k=2, renormalize="topk")
        for part in scores_TE.split(sizes)
    ]
    for rule in ("none", "balance"):
        rounding = RoundingConfig(rule, tile=4, balance_groups=4, capacity_factor=1.0, scope="rank")
        results = rounded_on_ranks(parts, rounding)
        want = [
            round_all_tokens(part, 2, tile=4, rule=rule, groups=4, capacity_factor=Fraction(1))[1]
            for part in scores_TE.split(sizes)
        ]
        assert torch.equal(masks(results), torch.cat(want))
        assert torch.equal(results[0].target_E, torch.cat(want).sum(0))


def test_messages() -> None:
    """Three sums of E * 512 counts and one gather of 2 E, whatever is dropped; quota sends none."""
    scores_TE = make_scores("one favourite", 40, 8, seed=0)

    def sent(rank: int, selection: str) -> dict[str, int]:
        exchange = make_exchange(dist.group.WORLD)
        round_tokens(
            scores_TE[rank * 10 : rank * 10 + 10],
            2,
            rule="none",
            selection=selection,
            capacity_factor=1.0,
            exchange=exchange,
        )
        return exchange.traffic.bytes_sent

    counts = {"counts": 3 * 4 * 9}
    key_counts = {"key counts": 3 * 2 * 3 * 4 * 8 * 512 // 4, "key ties": 3 * 4 * 2 * 8}
    assert run_ranks(sent, 4, "exact") == [counts | key_counts] * 4
    assert run_ranks(sent, 4, "quota") == [counts] * 4


@pytest.mark.parametrize("factor", [-1.0, 0.5, float("nan"), float("inf")])
def test_an_impossible_factor_is_named(factor: float) -> None:
    with pytest.raises(ValueError, match=r"capacity_factor is .*; it must be 0 or at least 1"):
        round_tokens(torch.rand(4, 6), 2, capacity_factor=factor)
