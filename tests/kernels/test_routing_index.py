"""Pairs by expert and by token: every backend against loops."""

from __future__ import annotations

import pytest
import torch

from distmoe.kernels.routing_index import routing_index
from distmoe.kernels.testing import poisoned_empty
from distmoe.registry import ROUTING_INDEX_BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Tokens, experts, share of selected pairs.
CASES = [
    (7, 4, 0.5),
    (150, 10, 0.3),
    (64, 1, 0.7),
    (3, 70, 0.2),
    (33, 6, 0.0),
    (20, 5, 1.0),
    (0, 4, 1),
]


@pytest.mark.parametrize("spare", [0, 13])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", list(ROUTING_INDEX_BACKENDS))
def test_index(backend: str, case: tuple[int, int, float], spare: int) -> None:
    num_tokens, num_experts, share = case
    generator = torch.Generator().manual_seed(num_tokens)
    selected_TE = (torch.rand(num_tokens, num_experts, generator=generator) < share).to(DEVICE)
    pairs = [(e, t) for e in range(num_experts) for t in range(num_tokens) if selected_TE[t, e]]
    by_token = sorted(range(len(pairs)), key=lambda n: (pairs[n][1], pairs[n][0]))
    with poisoned_empty():
        index = routing_index(selected_TE, max_pairs=len(pairs) + spare, backend=backend)
    tail = [0] * spare
    assert index.expert_N.tolist() == [e for e, _ in pairs] + tail
    assert index.token_N.tolist() == [t for _, t in pairs] + tail
    assert index.by_token_N.tolist() == by_token + tail
    assert index.counts_E.tolist() == selected_TE.sum(0).tolist()
    assert index.token_offsets_T1.diff().tolist() == selected_TE.sum(1).tolist()
    assert index.token_offsets_T1[0] == 0
    assert {x.dtype for x in vars(index).values()} == {torch.int32}


@pytest.mark.parametrize("backend", list(ROUTING_INDEX_BACKENDS))
def test_pairs_beyond_the_bound_are_lost_and_write_nowhere(backend: str) -> None:
    selected_TE = torch.ones(40, 3, dtype=torch.bool, device=DEVICE)
    index = routing_index(selected_TE, max_pairs=50, backend=backend)
    assert index.token_N.tolist() == [*range(40), *range(10)]
    assert index.expert_N.tolist() == [0] * 40 + [1] * 10
