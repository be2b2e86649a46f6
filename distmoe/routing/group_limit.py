"""A token may choose among the experts of a few groups only (arXiv 2405.04434, 2412.19437).

Groups are equal runs of experts. A token takes the groups whose summed keys are largest, ties to
the lower group, then its top-k among their experts. All in integers, the bias included.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distmoe.config import ExpertGroups, MoEConfig
from distmoe.kernels.round_select import NOTHING
from distmoe.kernels.router_topk.torch_backend import choose_top_k
from distmoe.routing.routers import Scores


class GroupLimit:
    """``group_score``: a group counts as the sum of its best 1 (``max``, DeepSeek-V2), 2 (``top2``,
    DeepSeek-V3) or ceil(top_k / groups of a token) keys (``sum``, DeepSeek-V3's nodes)."""

    def __init__(self, groups: ExpertGroups, *, top_k: int, group_score: str) -> None:
        self.groups, self.top_k = groups, top_k
        by_share = -(-top_k // groups.per_token)
        self.keys_of_a_group = {"max": 1, "top2": 2, "sum": by_share}[group_score]

    @torch.no_grad()
    def allowed(self, key_TE: Tensor) -> Tensor:
        """[T, E] bool: the pairs in the groups of each token."""
        num_tokens, num_experts = key_TE.shape
        size = num_experts // self.groups.count
        key_TGX = key_TE.view(num_tokens, self.groups.count, size)
        # A sum of int32 is int64.
        best_TG = key_TGX.topk(min(self.keys_of_a_group, size), dim=2).values.sum(2)
        group_TG = choose_top_k(best_TG, self.groups.per_token)
        return group_TG[:, :, None].expand(-1, -1, size).reshape(num_tokens, num_experts)

    def __call__(self, scores: Scores) -> Scores:
        """``scores`` with another choice, and key NOTHING for what is not allowed."""
        allowed_TE = self.allowed(scores.key_TE)
        key_TE = torch.where(allowed_TE, scores.key_TE, NOTHING)
        # Again in PyTorch: the mark of the fused choice for what is taken is NOTHING, too.
        chosen_TE = choose_top_k(key_TE, self.top_k)
        return replace(scores, key_TE=key_TE, chosen_TE=chosen_TE, allowed_TE=allowed_TE)


def group_limit(config: MoEConfig, groups: ExpertGroups | None) -> GroupLimit | None:
    """The limit of a layer, if it has one."""
    if groups is None:
        return None
    return GroupLimit(groups, top_k=config.top_k, group_score=config.group_score)
