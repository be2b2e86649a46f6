"""Both transports of candidates give the same pairs, and the bytes that they promise."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.registry import ROUNDING_TRANSPORTS
from distmoe.routing import round_tokens
from distmoe.routing.rounding.transports import by_all_gather, by_owner, transport_for

TILE, E = 8, 16


def scores_of(num_tokens: int, levels: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    score_TE = torch.randn(num_tokens, E, generator=generator).softmax(1)
    return (score_TE * levels).round() / levels if levels else score_TE


@pytest.mark.parametrize("rule", ["balance", "nearest", "up", "down"])
@pytest.mark.parametrize("levels", [0, 8])
@pytest.mark.parametrize("sizes", [[40, 40], [0, 33, 50, 7], [9] * 8, [6] * 16], ids=str)
def test_the_same_pairs(sizes: list[int], levels: int, rule: str) -> None:
    """As integers, ties across ranks and empty ranks among them, and those of one process."""
    score_TE = scores_of(sum(sizes), levels)
    parts = score_TE.split(sizes)

    def one(rank: int, transport: str) -> tuple[Tensor, dict[str, int]]:
        exchange = make_exchange(dist.group.WORLD)
        routing = round_tokens(
            parts[rank], 3, tile=TILE, rule=rule, transport=transport, exchange=exchange,
            balance_groups=len(sizes),
        )  # fmt: skip
        mask_TE = torch.zeros(parts[rank].shape, dtype=torch.bool)
        mask_TE[routing.token_N.long(), routing.expert_N.long()] = True
        return mask_TE, exchange.traffic.bytes_sent

    alone = round_tokens(score_TE, 3, tile=TILE, rule=rule, balance_groups=len(sizes))
    want_TE = torch.zeros(score_TE.shape, dtype=torch.bool)
    want_TE[alone.token_N.long(), alone.expert_N.long()] = True
    others = len(sizes) - 1
    for transport in ROUNDING_TRANSPORTS:
        results = run_ranks(one, len(sizes), transport)
        assert torch.equal(torch.cat([mask for mask, _ in results]), want_TE), transport
        counts, candidates = 4 * (E + 1) * others, 4 * (TILE - 1) * others
        want = {
            "all_gather": {"counts": counts, "candidates": candidates * E},
            "owner": {
                "counts": counts,
                "candidates": candidates * (E // len(sizes)),
                "accepted": 4 * (E // len(sizes)) * others,
            },
        }
        assert [sent for _, sent in results] == [want[transport]] * len(sizes)


def test_auto_and_what_is_refused() -> None:
    class Ranks:
        def __init__(self, size: int) -> None:
            self.size = size

    def picked(name: str, size: int, num_experts: int) -> object:
        return transport_for(name, Ranks(size), num_experts=num_experts)  # type: ignore[arg-type]

    assert picked("auto", 16, 64) is by_all_gather
    assert picked("auto", 32, 64) is by_owner
    assert picked("auto", 32, 48) is by_all_gather
    with pytest.raises(ValueError, match="the 4 ranks must divide the 6 experts"):
        picked("owner", 4, 6)
    with pytest.raises(
        ValueError, match="unknown rounding transport 'x'; known: all_gather, owner"
    ):
        picked("x", 4, 8)
