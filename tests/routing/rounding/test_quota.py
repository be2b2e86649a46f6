"""The quota selection: exact in counts, each rank's best pairs, no communication of its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import Tensor

from distmoe.comm import make_exchange
from distmoe.kernels.router_topk.torch_backend import choose_top_k, integer_keys
from distmoe.routing import round_tokens
from distmoe.routing.rounding import reference
from distmoe.routing.rounding.quota import shares
from distmoe.routing.rounding.reference import select_reference


@given(
    eligible=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_shares_are_the_largest_remainders(eligible: list[list[int]], seed: int) -> None:
    eligible_PE = torch.tensor(eligible)
    generator = torch.Generator().manual_seed(seed)
    total_E = eligible_PE.sum(0)
    amount_E = (torch.rand(3, generator=generator) * (total_E + 1)).long().clamp(max=total_E)
    share_PE = shares(eligible_PE, amount_E)
    assert torch.equal(share_PE.sum(0), amount_E)
    assert (share_PE <= eligible_PE).all()
    for e, (total, amount) in enumerate(zip(total_E.tolist(), amount_E.tolist(), strict=True)):
        column = eligible_PE[:, e].tolist()
        floors = [x * amount // max(total, 1) for x in column]
        rests = [x * amount % max(total, 1) for x in column]
        first = sorted(range(len(column)), key=lambda r: (-rests[r], r))
        for rank in first[: amount - sum(floors)]:
            floors[rank] += 1
        assert share_PE[:, e].tolist() == floors


def rounded(scores_TE: Tensor, sizes: list[int], rule: str) -> list[Tensor]:
    parts = scores_TE.split(sizes)

    def one(rank: int) -> Tensor:
        routing = round_tokens(
            parts[rank], 3, tile=8, rule=rule, selection="quota", group=dist.group.WORLD
        )
        routing.validate()
        mask_TE = torch.zeros(parts[rank].shape, dtype=torch.bool)
        mask_TE[routing.token_N.long(), routing.expert_N.long()] = True
        return mask_TE

    return run_ranks(one, len(sizes))


@pytest.mark.parametrize("rule", [name for name in reference.RULES if name != "none"])
@pytest.mark.parametrize("sizes", [[40, 40], [0, 33, 50, 7], [10] * 8])
def test_counts_are_the_targets_and_ranks_change_their_best_pairs(
    sizes: list[int], rule: str
) -> None:
    num_tokens, generator = sum(sizes), torch.Generator().manual_seed(len(sizes))
    scores_TE = torch.rand(num_tokens, 8, generator=generator)
    chosen_TE = choose_top_k(integer_keys(scores_TE), 3)
    want_E = reference.RULES[rule](chosen_TE.sum(0).tolist(), 8, num_tokens, len(sizes))
    masks = rounded(scores_TE, sizes, rule)
    assert torch.cat(masks).sum(0).tolist() == want_E
    for mask_TE, part, chosen in zip(
        masks, scores_TE.split(sizes), chosen_TE.split(sizes), strict=True
    ):
        own = select_reference(integer_keys(part), chosen, mask_TE.sum(0))
        assert torch.equal(mask_TE, own)


def test_one_rank_is_exact() -> None:
    scores_TE = torch.rand(90, 8, generator=torch.Generator().manual_seed(1))
    quota, exact = (round_tokens(scores_TE, 3, tile=8, selection=s) for s in ("quota", "exact"))
    assert torch.equal(quota.token_N, exact.token_N)
    assert torch.equal(quota.expert_N, exact.expert_N)


def test_no_collective_of_its_own() -> None:
    """One all-gather for the counts; `exact` has a small round of its own."""
    scores_TE = torch.rand(80, 8, generator=torch.Generator().manual_seed(2))

    def rounds(rank: int, selection: str) -> dict[str, int]:
        exchange = make_exchange(dist.group.WORLD)
        part = scores_TE[rank * 40 : (rank + 1) * 40]
        round_tokens(part, 3, tile=8, selection=selection, exchange=exchange)
        return exchange.traffic.rounds

    assert run_ranks(rounds, 2, "quota") == [{"counts": 1}] * 2
    assert run_ranks(rounds, 2, "exact") == [{"counts": 1, "candidates": 1}] * 2
