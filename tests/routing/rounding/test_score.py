"""The rule that weighs scores: against the oracle on any ranks, and in the mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.config import ExpertGroups, RoundingConfig
from distmoe.kernels.router_topk.torch_backend import integer_keys
from distmoe.registry import ROUNDING_RULES
from distmoe.routing import round_tokens
from distmoe.routing.group_limit import GroupLimit
from distmoe.routing.round_tokens import round_scores
from distmoe.routing.rounding import Population
from distmoe.routing.rounding.border import key_sums
from distmoe.routing.rounding.reference import round_all_tokens
from distmoe.routing.routers import make_router, scores_from_logits

SIZES = {"one": [80], "even": [40, 40], "uneven": [0, 33, 40, 7], "few tokens": [3, 2]}


def scores_of(num_tokens: int, *, levels: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    score_TE = torch.randn(num_tokens, 10, generator=generator).softmax(1)
    return (score_TE * levels).round() / levels if levels else score_TE


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("tile", [1, 3, 8, 16])
@pytest.mark.parametrize("case", SIZES)
def test_every_rank_count_gives_the_pairs_of_the_oracle(case: str, tile: int, levels: int) -> None:
    sizes = SIZES[case]
    score_TE = scores_of(sum(sizes), levels=levels)
    parts = score_TE.split(sizes)

    def one(rank: int) -> Tensor:
        group = dist.group.WORLD if len(sizes) > 1 else None
        routing = round_tokens(parts[rank], 3, tile=tile, rule="score", group=group)
        mask_TE = torch.zeros(parts[rank].shape, dtype=torch.bool)
        mask_TE[routing.token_N.long(), routing.expert_N.long()] = True
        return mask_TE

    _, want_TE = round_all_tokens(score_TE, 3, tile=tile, rule="score", groups=1)
    assert torch.equal(torch.cat(run_ranks(one, len(sizes))), want_TE)


def test_up_as_often_as_the_share_that_a_drop_would_lose() -> None:
    """Expert 0 has 6 of 8 rows, 300 to lose and 100 to add: three times in four it goes up."""
    rule = ROUNDING_RULES.load("score")
    sums = (torch.tensor([300]), torch.tensor([100]))
    ups = sum(
        int(rule(torch.tensor([6]), tile=8, room=99, groups=1, seed=s, key_sums=lambda: sums))
        for s in range(4000)
    )
    mean, error = ups / 8 / 4000, (0.75 * 0.25 / 4000) ** 0.5
    assert abs(mean - 0.75) <= 5 * error


@pytest.mark.parametrize("bias", [-(2**21), 2**21])
@pytest.mark.parametrize("case", ["one", "uneven"])
def test_a_bias_is_not_weighed(case: str, bias: int) -> None:
    """The same bias on all experts changes no choice, and so no sum and no target."""
    sizes = SIZES[case]
    parts = scores_of(sum(sizes)).split(sizes)
    rounding = RoundingConfig("score", tile=8, balance_groups=1)

    def one(rank: int) -> list[Tensor]:
        exchange = make_exchange(dist.group.WORLD if len(sizes) > 1 else None)
        found = []
        for bias_E in (None, torch.full((10,), bias, dtype=torch.int32)):
            scores = scores_from_logits(
                parts[rank], activation="none", top_k=3, renormalize="topk", bias_E=bias_E
            )
            found.append(round_scores(scores, exchange, rounding).selected_TE)
        return found

    for plain_TE, biased_TE in run_ranks(one, len(sizes)):
        assert torch.equal(biased_TE, plain_TE)


def test_sums_with_a_bias_are_those_of_the_scores_of_these_pairs() -> None:
    """Biases that differ move the choice; what is summed are scores, against a loop."""
    tile, score_TE = 8, scores_of(61)
    bias_E = torch.tensor([2**21, -(2**21)] * 5, dtype=torch.int32)
    scores = scores_from_logits(
        score_TE, activation="none", top_k=3, renormalize="topk", bias_E=bias_E
    )
    scores = GroupLimit(ExpertGroups(5, 3), top_k=3, group_score="max")(scores)
    chosen_TE, allowed_TE = scores.chosen_TE, scores.allowed_TE
    population = Population(chosen_TE.sum(0)[None], torch.tensor([61]), allowed_TE.sum(0)[None])
    lost_E, gained_E = key_sums(scores, population, tile=tile, exchange=make_exchange(None))
    mass_TE = integer_keys(score_TE)
    for e in range(10):
        rest = int(chosen_TE[:, e].sum()) % tile
        chosen = sorted(mass_TE[chosen_TE[:, e], e].tolist())
        others = sorted(mass_TE[allowed_TE[:, e] & ~chosen_TE[:, e], e].tolist(), reverse=True)
        assert int(lost_E[e]) == sum(chosen[:rest])
        assert int(gained_E[e]) == (sum(others[: tile - rest]) if rest else 0)


@pytest.mark.parametrize("router", ["balanced", "hash"])
def test_sums_of_a_forced_router_are_a_share(router: str) -> None:
    scores = make_router(router, top_k=3, renormalize="topk")(torch.randn(61, 10))
    population = Population(scores.chosen_TE.sum(0)[None], torch.tensor([61]), torch.tensor([[61]]))
    lost_E, gained_E = key_sums(scores, population, tile=8, exchange=make_exchange(None))
    assert (lost_E >= 0).all()
    assert (gained_E >= 0).all()


def test_counts_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="this rule weighs scores"):
        ROUNDING_RULES.load("score")(torch.tensor([6]), tile=8, room=99, groups=1)
