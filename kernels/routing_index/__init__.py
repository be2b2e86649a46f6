"""From the selected pairs [T, E] to lists of pairs by expert and by token, without a host sync."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distmoe.kernels.backends import fused_or_torch
from distmoe.registry import ROUTING_INDEX_BACKENDS


@dataclass(frozen=True)
class RoutingIndex:
    """All int32. Pairs sorted by (expert, token): ``token_N``, ``expert_N``, ``counts_E``.

    ``by_token_N`` lists the pairs by (token, expert); token t owns
    by_token_N[token_offsets_T1[t]:token_offsets_T1[t + 1]]. N may exceed the number of pairs,
    counts_E.sum(), which only the device knows: what lies behind is 0.
    """

    token_N: Tensor
    expert_N: Tensor
    counts_E: Tensor
    by_token_N: Tensor
    token_offsets_T1: Tensor


class RoutingIndexBackend(Protocol):
    """Builds the index of ``selected_TE`` bool, with exactly ``max_pairs`` entries."""

    def __call__(self, selected_TE: Tensor, max_pairs: int) -> RoutingIndex: ...


def routing_index(selected_TE: Tensor, *, max_pairs: int, backend: str = "auto") -> RoutingIndex:
    """``max_pairs``: a bound on the selected pairs that the host knows. Pairs beyond it are lost,
    and nothing is written out of bounds."""
    name = fused_or_torch(selected_TE.device) if backend == "auto" else backend
    build: RoutingIndexBackend = ROUTING_INDEX_BACKENDS.load(name)
    return build(selected_TE.contiguous(), max_pairs)


def no_pairs(selected_TE: Tensor, max_pairs: int) -> RoutingIndex:
    """The index where no pair can exist."""
    num_tokens, num_experts = selected_TE.shape
    none = torch.zeros(max_pairs, dtype=torch.int32, device=selected_TE.device)
    counts_E, offsets_T1 = none.new_zeros(num_experts), none.new_zeros(num_tokens + 1)
    return RoutingIndex(none, none, counts_E, none, offsets_T1)
