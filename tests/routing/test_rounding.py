"""Token rounding over any number of ranks is, integer for integer, the central rule."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.registry import ROUNDING_RULES
from distmoe.routing import Routing, round_tokens
from distmoe.routing.rounding.reference import select_reference, top_k_reference

# The one that weighs scores has tests of its own.
RULES = [rule for rule in ROUNDING_RULES if rule not in ("none", "score")]
PLENTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Scores [T, E], top_k, tile; random, tied everywhere, empty experts, or all to one expert."""
    num_tokens = draw(st.integers(0, 70))
    num_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, num_experts))
    tile = draw(st.integers(1, 24))
    kind = draw(st.sampled_from(["random", "ties", "equal", "one_expert", "empty_experts"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores_TE = torch.rand(num_tokens, num_experts, generator=generator)
    if kind == "ties":
        scores_TE = (scores_TE * 3).floor() / 3
    elif kind == "equal":
        scores_TE = torch.full_like(scores_TE, 0.5)
    elif kind == "one_expert":
        scores_TE[:, num_experts // 2] = 1.0
    elif kind == "empty_experts":
        scores_TE[:, num_experts // 2 :] = 0.0
    return scores_TE, top_k, tile


def targets(rule: str, freq_E: Tensor, tile: int, num_tokens: int, groups: int = 1) -> Tensor:
    rounded: Tensor = ROUNDING_RULES.load(rule)(freq_E, tile=tile, room=num_tokens, groups=groups)
    return rounded


def pairs(routing: Routing, first_token: int = 0) -> list[tuple[int, int]]:
    return list(
        zip(routing.expert_N.tolist(), (routing.token_N + first_token).tolist(), strict=True)
    )


def central(
    scores_TE: Tensor, top_k: int, tile: int, rule: str, groups: int
) -> list[tuple[int, int]]:
    key_TE = integer_keys(scores_TE)
    chosen_TE = top_k_reference(key_TE, top_k)
    target_E = targets(rule, chosen_TE.sum(0), tile, len(scores_TE), groups)
    selected_TE = select_reference(key_TE, chosen_TE, target_E)
    return [tuple(pair) for pair in selected_TE.T.nonzero().tolist()]


def on_ranks(
    scores_TE: Tensor, sizes: list[int], top_k: int, tile: int, rule: str, groups: int
) -> list[tuple[int, int]]:
    parts = scores_TE.split(sizes)

    def one(rank: int) -> list[tuple[int, int]]:
        routing = round_tokens(
            parts[rank],
            top_k,
            tile=tile,
            rule=rule,
            group=dist.group.WORLD,
            balance_groups=groups,
        )
        return pairs(routing, sum(sizes[:rank]))

    return sorted(itertools.chain(*run_ranks(one, len(sizes))))


@pytest.mark.parametrize("rule", RULES)
@given(problem=problems())
@PLENTY
def test_one_rank_is_the_central_rule(rule: str, problem: tuple[Tensor, int, int]) -> None:
    scores_TE, top_k, tile = problem
    routing = round_tokens(scores_TE, top_k, tile=tile, rule=rule)
    assert pairs(routing) == central(scores_TE, top_k, tile, rule, 1)


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("rule", RULES)
@given(problem=problems(), cut_seed=st.integers(0, 2**16))
@settings(PLENTY, max_examples=15)
def test_ranks_select_what_one_would(
    rule: str, num_ranks: int, problem: tuple[Tensor, int, int], cut_seed: int
) -> None:
    scores_TE, top_k, tile = problem
    num_tokens, num_experts = scores_TE.shape
    # Uneven cuts, empty ranks among them.
    generator = torch.Generator().manual_seed(cut_seed)
    cuts = torch.randint(0, num_tokens + 1, (num_ranks - 1,), generator=generator).sort().values
    sizes = torch.diff(cuts, prepend=torch.zeros(1, dtype=torch.long)).tolist()
    sizes.append(num_tokens - sum(sizes))
    groups = max(g for g in range(1, num_ranks + 1) if num_experts % g == 0)
    together = on_ranks(scores_TE, sizes, top_k, tile, rule, groups)
    assert together == central(scores_TE, top_k, tile, rule, groups)


@st.composite
def frequencies(draw: st.DrawFn) -> tuple[Tensor, int, int, int]:
    """f_E, tile, tokens, groups."""
    groups = draw(st.integers(1, 4))
    num_experts = groups * draw(st.integers(1, 3))
    num_tokens = draw(st.integers(0, 60))
    freq = draw(st.lists(st.integers(0, num_tokens), min_size=num_experts, max_size=num_experts))
    return torch.tensor(freq), draw(st.integers(1, 24)), num_tokens, groups


@pytest.mark.parametrize("rule", RULES)
@given(problem=frequencies())
@PLENTY
def test_targets_are_tiles_less_than_a_tile_away(
    rule: str, problem: tuple[Tensor, int, int, int]
) -> None:
    freq_E, tile, num_tokens, groups = problem
    target_E = targets(rule, freq_E, tile, num_tokens, groups)
    assert (target_E % tile == 0).all()
    assert ((target_E - freq_E).abs() < tile).all()
    assert (target_E <= num_tokens).all()
    assert (target_E[freq_E % tile == 0] == freq_E[freq_E % tile == 0]).all()


@given(problem=frequencies())
@settings(PLENTY, max_examples=150)
def test_balance_reaches_the_optimum(problem: tuple[Tensor, int, int, int]) -> None:
    """Over all floor or ceiling choices with as many tiles, none has a lighter busiest run; of
    those as light, none keeps more pairs in the tiles that it rounds up."""
    freq_E, tile, num_tokens, groups = problem
    target_E = targets("balance", freq_E, tile, num_tokens, groups)
    tiles_E = target_E // tile
    floor_E = freq_E // tile
    rest_E = freq_E % tile
    may_E = (rest_E > 0) & ((floor_E + 1) * tile <= num_tokens)
    wanted = min(int((2 * rest_E.sum() + tile) // (2 * tile)), int(may_E.sum()))
    assert int((tiles_E - floor_E).sum()) == wanted
    if int(may_E.sum()) == int((rest_E > 0).sum()) and int((rest_E > 0).sum()) >= wanted:
        assert 2 * abs(int(target_E.sum() - freq_E.sum())) <= tile
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


def test_nearest_drops_a_tie() -> None:
    freq_E = torch.tensor([4, 5, 12, 13, 3, 0, 8])
    assert targets("nearest", freq_E, 8, 100).tolist() == [0, 8, 8, 16, 0, 0, 8]


def test_the_published_example() -> None:
    """8 ranks, 256 experts, top 8, 2048 tokens a rank: the balanced tiles are level."""
    generator = torch.Generator().manual_seed(0)
    scores_TE = torch.randn(8 * 2048, 256, generator=generator).softmax(1)
    freq_E = choose_top_k(integer_keys(scores_TE), 8).sum(0)
    by_rank = targets("balance", freq_E, 128, len(scores_TE), 8).view(8, -1).sum(1) // 128
    assert by_rank.tolist() == [128] * 8
    assert int((-(-freq_E // 128)).view(8, -1).sum(1).max()) > 135


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


def test_two_small_messages_a_layer() -> None:
    """Rounding adds the counts and the candidates: 4 (E + 1) and 4 E (M - 1) bytes to each peer."""
    scores_TE = torch.rand(32, 8, generator=torch.Generator().manual_seed(2))

    def sent(rank: int) -> dict[str, int]:
        exchange = make_exchange(dist.group.WORLD)
        round_tokens(scores_TE[rank * 8 : rank * 8 + 8], 2, tile=4, exchange=exchange)
        return exchange.traffic.bytes_sent

    assert run_ranks(sent, 4) == [{"counts": 3 * 4 * 9, "candidates": 3 * 4 * 8 * 3}] * 4


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
