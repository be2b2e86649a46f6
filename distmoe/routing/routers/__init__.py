"""Routers: logits -> scores, integer keys, and the top-k choice.

A router is built with (top_k, renormalize) and called with logits_TE (fp32). Decisions are made on
integer keys, key = floor(score * 2^24), so that they depend neither on the order of a sum nor on
the number of ranks. Ties go to the lower expert id inside a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distmoe.registry import ROUTERS

KEY_SCALE = 1 << 24


@dataclass(frozen=True)
class Scores:
    """``score_TE`` fp32, differentiable; ``key_TE`` int32; ``chosen_TE`` bool, top_k a token.

    ``renormalize``: what a pair's weight is divided by; see `weight`.
    """

    score_TE: Tensor
    key_TE: Tensor
    chosen_TE: Tensor
    top_k: int
    renormalize: str

    def weight(self, selected_TE: Tensor) -> Tensor:
        """[T, E] fp32 weights. ``topk``: score over the sum of the token's top-k scores, the same
        scale for pairs that rounding added; ``assigned``: over the sum of the selected; ``none``:
        the score."""
        if self.renormalize == "none":
            return self.score_TE
        counted_TE = self.chosen_TE if self.renormalize == "topk" else selected_TE
        total_T = torch.where(counted_TE, self.score_TE, 0.0).sum(1, keepdim=True)
        return self.score_TE / total_T.clamp(min=torch.finfo(torch.float32).tiny)


class Router(Protocol):
    """One way from logits to scores."""

    def __call__(self, logits_TE: Tensor) -> Scores: ...


def make_router(name: str, *, top_k: int, renormalize: str) -> Router:
    """The router called ``name``; ValueError for settings that it cannot honour."""
    router: Router = ROUTERS.load(name)(top_k=top_k, renormalize=renormalize)
    return router


@torch.no_grad()
def integer_keys(score_TE: Tensor) -> Tensor:
    """floor(score * 2^24) as int32, in 0..2^24; the product is exact, a power of two."""
    # A diverged run has NaN scores: any key in range keeps the counts aligned until the loss is
    # found to be NaN and the step is skipped.
    return (score_TE.nan_to_num(0.0).clamp(0.0, 1.0) * KEY_SCALE).floor().to(torch.int32)


@torch.no_grad()
def choose_top_k(key_TE: Tensor, top_k: int) -> Tensor:
    """[T, E] bool: the ``top_k`` largest keys of a token, ties to the lower expert id."""
    num_experts = key_TE.shape[1]
    descending_E = torch.arange(num_experts - 1, -1, -1, device=key_TE.device)
    # Distinct numbers, so that the order of equal keys is not left to the sort.
    distinct_TE = key_TE.long() * num_experts + descending_E
    chosen_TK = distinct_TE.topk(top_k, dim=1).indices
    return torch.zeros_like(key_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)


def scores_from_probabilities(score_TE: Tensor, *, top_k: int, renormalize: str) -> Scores:
    """Keys and the top-k choice for given scores in [0, 1]."""
    key_TE = integer_keys(score_TE)
    return Scores(score_TE, key_TE, choose_top_k(key_TE, top_k), top_k, renormalize)
