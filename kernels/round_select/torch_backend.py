"""Rounding's local selection in plain PyTorch: a partial top-k per expert."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.round_select import NOTHING


class TorchRoundSelect:
    """Any device. ``take`` ranks a whole column on distinct integers, which leaves no tie."""

    def priorities(self, key_TE: Tensor, chosen_TE: Tensor, adds_E: Tensor) -> Tensor:
        eligible_ET = chosen_TE.T ^ adds_E[:, None]
        signed_ET = key_TE.T * torch.where(adds_E, 1, -1).int()[:, None]
        return torch.where(eligible_ET, signed_ET, NOTHING)

    def best(self, priority_ET: Tensor, num: int) -> Tensor:
        num_experts, num_tokens = priority_ET.shape
        width = min(num, num_tokens)
        best_EC = priority_ET.new_full((num_experts, num), NOTHING)
        best_EC[:, :width] = priority_ET.topk(width, dim=1).values
        return best_EC

    def take(
        self,
        chosen_TE: Tensor,
        priority_ET: Tensor,
        amount_E: Tensor,
        adds_E: Tensor,
        *,
        most: int,
    ) -> Tensor:
        num_tokens = priority_ET.shape[1]
        width = min(most, num_tokens)
        token_T = torch.arange(num_tokens, device=priority_ET.device)
        earlier_ET = torch.where(adds_E[:, None], num_tokens - 1 - token_T, token_T)
        distinct_ET = priority_ET.long() * num_tokens + earlier_ET
        best_EC = distinct_ET.topk(width, dim=1).indices
        taken_ET = torch.zeros_like(priority_ET, dtype=torch.bool)
        taken_ET.scatter_(1, best_EC, token_T[:width] < amount_E[:, None])
        return chosen_TE ^ (taken_ET & (priority_ET > NOTHING)).T
