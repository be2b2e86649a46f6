"""Routing: which tokens go to which experts, with what weight. The one type of every router.

Flat, because after rounding the number of experts of a token varies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """(token, expert) pairs sorted by (expert, token).

    ``token_N``, ``expert_N`` int32; ``score_N`` fp32, the differentiable weight of a pair;
    ``counts_E`` int32. ``by_token_N`` int32 lists the pairs by (token, expert), which fixes the
    order of sums over a token's pairs; token t owns
    by_token_N[token_offsets_T1[t]:token_offsets_T1[t + 1]].
    """

    token_N: Tensor
    expert_N: Tensor
    score_N: Tensor
    counts_E: Tensor
    by_token_N: Tensor
    token_offsets_T1: Tensor
    num_tokens: int
    num_experts: int

    @staticmethod
    def from_mask(selected_TE: Tensor, weight_TE: Tensor) -> Routing:
        """From the selected pairs [T, E] bool and the weight of every pair [T, E] fp32."""
        num_tokens, num_experts = selected_TE.shape
        expert_N, token_N = selected_TE.T.nonzero(as_tuple=True)
        per_token_T = selected_TE.sum(1)
        token_offsets_T1 = torch.zeros(num_tokens + 1, dtype=torch.int32, device=selected_TE.device)
        token_offsets_T1[1:] = per_token_T.cumsum(0)
        return Routing(
            token_N=token_N.int(),
            expert_N=expert_N.int(),
            score_N=weight_TE[token_N, expert_N],
            counts_E=selected_TE.sum(0, dtype=torch.int32),
            by_token_N=torch.argsort(token_N, stable=True).int(),
            token_offsets_T1=token_offsets_T1,
            num_tokens=num_tokens,
            num_experts=num_experts,
        )

    def with_scores(self, weight_TE: Tensor) -> Routing:
        """The same pairs with weights taken from ``weight_TE``."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["score_N"] = weight_TE[self.token_N.long(), self.expert_N.long()]
        return Routing(**values)
