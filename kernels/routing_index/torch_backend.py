"""The routing index by cumulative sums and scatters into a buffer with one spare place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.kernels.routing_index import RoutingIndex, no_pairs


def build(selected_TE: Tensor, max_pairs: int) -> RoutingIndex:
    """See `routing_index`."""
    num_tokens, num_experts = selected_TE.shape
    if not max_pairs or not selected_TE.numel():
        return no_pairs(selected_TE, max_pairs)
    device = selected_TE.device
    token_T1 = torch.arange(num_tokens, dtype=torch.int32, device=device)[:, None]
    expert_E = torch.arange(num_experts, dtype=torch.int32, device=device)
    pair_ET = _places(selected_TE.T, max_pairs)
    order_TE = _places(selected_TE, max_pairs)
    per_token_T = selected_TE.sum(1, dtype=torch.int32)
    return RoutingIndex(
        token_N=_scatter(pair_ET, token_T1.expand_as(selected_TE).T, max_pairs),
        expert_N=_scatter(pair_ET, expert_E.expand_as(selected_TE).T, max_pairs),
        counts_E=selected_TE.sum(0, dtype=torch.int32),
        by_token_N=_scatter(order_TE, pair_ET.T.int(), max_pairs),
        token_offsets_T1=F.pad(per_token_T.cumsum(0, dtype=torch.int32), (1, 0)),
    )


def _places(selected: Tensor, max_pairs: int) -> Tensor:
    """int64: how many were selected before, in row-major order; ``max_pairs`` elsewhere."""
    place = (selected.reshape(-1).cumsum(0) - 1).view(selected.shape)
    return torch.where(selected, place, max_pairs).clamp_(max=max_pairs)


def _scatter(place: Tensor, values: Tensor, max_pairs: int) -> Tensor:
    out = torch.zeros(max_pairs + 1, dtype=torch.int32, device=values.device)
    return out.scatter_(0, place.reshape(-1), values.reshape(-1))[:max_pairs]
