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
