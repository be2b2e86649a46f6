"""The rule that weighs scores: against the oracle on any ranks, and in the mean."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe.registry import ROUNDING_RULES
from distmoe.routing import round_tokens
from distmoe.routing.rounding.reference import round_all_tokens

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


def test_counts_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="this rule weighs scores"):
        ROUNDING_RULES.load("score")(torch.tensor([6]), tile=8, room=99, groups=1)
