"""Rounding where a token may take the experts of some groups only."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.comm import make_exchange
from distmoe.config import RoundingConfig
from distmoe.kernels.round_select import NOTHING
from distmoe.kernels.router_topk.torch_backend import choose_top_k
from distmoe.routing.round_tokens import Rounded, round_scores
from distmoe.routing.routers import Scores

TILE, E, K, GROUPS = 8, 8, 2, 4
SIZES = [40, 0, 33, 23]


def limited_scores(num_tokens: int) -> Scores:
    """Each token may take two of the four groups; the last group is allowed to five tokens only."""
    generator = torch.Generator().manual_seed(4)
    key_TE = torch.randint(0, 40, (num_tokens, E), generator=generator, dtype=torch.int32)
    order_TG = torch.rand(num_tokens, GROUPS, generator=generator).argsort(1)
    allowed_TG = order_TG < 2
    allowed_TG[5:, 3] = False
    allowed_TG[:, 0] |= allowed_TG.sum(1) < 2
    allowed_TE = allowed_TG.repeat_interleave(E // GROUPS, dim=1)
    key_TE = torch.where(allowed_TE, key_TE, NOTHING).int()
    return Scores(
        score_TE=key_TE.float(),
        key_TE=key_TE,
        chosen_TE=choose_top_k(key_TE, K),
        top_k=K,
        renormalize="topk",
        allowed_TE=allowed_TE,
    )


def part(scores: Scores, rows: slice) -> Scores:
    return Scores(
        score_TE=scores.score_TE[rows],
        key_TE=scores.key_TE[rows],
        chosen_TE=scores.chosen_TE[rows],
        top_k=K,
        renormalize="topk",
        allowed_TE=None if scores.allowed_TE is None else scores.allowed_TE[rows],
    )


def on_ranks(scores: Scores, rounding: RoundingConfig) -> list[Rounded]:
    bounds = torch.tensor([0, *SIZES]).cumsum(0).tolist()

    def one(rank: int) -> Rounded:
        own = part(scores, slice(bounds[rank], bounds[rank + 1]))
        return round_scores(own, make_exchange(dist.group.WORLD), rounding)

    return run_ranks(one, len(SIZES))


@pytest.mark.parametrize("selection", ["exact", "quota"])
@pytest.mark.parametrize("rule", ["balance", "nearest", "up", "down", "stochastic", "score"])
def test_no_forbidden_pair_is_added(rule: str, selection: str) -> None:
    scores = limited_scores(sum(SIZES))
    assert scores.allowed_TE is not None
    rounding = RoundingConfig(rule, tile=TILE, selection=selection, balance_groups=4)
    results = on_ranks(scores, rounding)
    selected_TE = torch.cat([result.selected_TE for result in results])
    count_E, room_E = selected_TE.sum(0), scores.allowed_TE.sum(0)
    assert not (selected_TE & ~scores.allowed_TE).any()
    assert torch.equal(count_E, results[0].target_E)
    assert (count_E % TILE == 0).all()
    assert ((count_E - scores.chosen_TE.sum(0)).abs() < TILE).all()
    assert (count_E <= room_E).all()
    for rank, result in enumerate(results):
        assert result.from_ranks_Pe is not None
        counts_PE = torch.stack([r.selected_TE.sum(0) for r in results])
        assert torch.equal(result.from_ranks_Pe, counts_PE[:, 2 * rank : 2 * rank + 2])
    if selection == "exact":
        alone = round_scores(scores, make_exchange(None), rounding)
        assert torch.equal(alone.selected_TE, selected_TE)


def test_an_expert_without_room_for_a_tile_gets_none() -> None:
    """Five tokens may take the last group, so no tile of eight can be filled there."""
    scores = limited_scores(sum(SIZES))
    freq_E = scores.chosen_TE.sum(0)
    assert freq_E[-2:].sum() > 0, "nobody chose the last group"
    for result in on_ranks(scores, RoundingConfig("up", tile=TILE)):
        assert result.target_E[-2:].tolist() == [0, 0]


def test_one_more_number_an_expert_travels() -> None:
    scores = limited_scores(sum(SIZES))
    rounding = RoundingConfig("balance", tile=TILE, selection="quota")

    def sent(rank: int, limited: bool) -> dict[str, int]:
        exchange = make_exchange(dist.group.WORLD)
        own = part(scores, slice(10 * rank, 10 * rank + 10))
        if not limited:
            own = Scores(own.score_TE, own.key_TE, own.chosen_TE, K, "topk")
        round_scores(own, exchange, rounding)
        return exchange.traffic.bytes_sent

    assert run_ranks(sent, 2, False) == [{"counts": 4 * (E + 1)}] * 2
    assert run_ranks(sent, 2, True) == [{"counts": 4 * (2 * E + 1)}] * 2


def test_tokens_of_a_population() -> None:
    """T counts tokens, whatever they may take."""
    scores = limited_scores(sum(SIZES))
    results = on_ranks(scores, RoundingConfig("none"))
    assert [int(result.num_tokens) for result in results] == [sum(SIZES)] * len(SIZES)
