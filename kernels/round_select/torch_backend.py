"""Rounding's local selection in plain PyTorch: a partial top-k per expert."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.round_select import NOTHING


class TorchRoundSelect:
    """Any device. ``take`` finds the last priority that is taken, and counts its equals."""

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
        width = min(most, priority_ET.shape[1])
        if not width:
            return chosen_TE
        best_EC = priority_ET.topk(width, dim=1).values
        # The last that is taken; others may equal it.
        last_E1 = best_EC.gather(1, (amount_E - 1).clamp(min=0)[:, None])
        above_ET, tie_ET = priority_ET > last_E1, priority_ET == last_E1
        wanted_E1 = (amount_E - above_ET.sum(1))[:, None]
        place_ET = tie_ET.cumsum(1, dtype=torch.int32)
        first_ET = place_ET <= wanted_E1
        last_ET = place_ET > place_ET[:, -1:] - wanted_E1
        taken_ET = above_ET | (tie_ET & torch.where(adds_E[:, None], first_ET, last_ET))
        taken_ET &= (priority_ET > NOTHING) & (amount_E > 0)[:, None]
        return chosen_TE ^ taken_ET.T

    def merge(self, best_PEC: Tensor, adds_E: Tensor, amount_E: Tensor) -> Tensor:
        num_ranks, num_experts, num = best_PEC.shape
        merged_EPC = best_PEC.transpose(0, 1).long()
        rank_P = torch.arange(num_ranks, device=amount_E.device)
        before_EP = torch.where(adds_E[:, None], num_ranks - 1 - rank_P, rank_P)
        distinct_EPC = merged_EPC * num_ranks + before_EP[:, :, None]
        best_EC = distinct_EPC.reshape(num_experts, -1).topk(num, dim=1).values
        last_E11 = best_EC.gather(1, (amount_E - 1).clamp(min=0)[:, None])[:, :, None]
        above_EP = (distinct_EPC > last_E11).sum(2)
        # All that equal the last one are of one rank, which takes what is left.
        left_E1 = amount_E[:, None] - above_EP.sum(1, keepdim=True)
        holds_EP = (distinct_EPC == last_E11).any(2)
        return torch.where(amount_E[:, None] > 0, above_EP + holds_EP * left_E1, 0).T
