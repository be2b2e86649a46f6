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

from distmoe.kernels.router_topk import route_top_k
from distmoe.registry import ROUTERS


@dataclass(frozen=True)
class Scores:
    """``score_TE`` fp32, differentiable; ``key_TE`` int32; ``chosen_TE`` bool, top_k a token.
    ``allowed_TE`` bool: pairs that may be chosen or added; None: all.

    ``renormalize``: what a pair's weight is divided by; see `weight`.
    """

    score_TE: Tensor
    key_TE: Tensor
    chosen_TE: Tensor
    top_k: int
    renormalize: str
    allowed_TE: Tensor | None = None

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


def scores_from_logits(
    logits_TE: Tensor, *, activation: str, top_k: int, renormalize: str
) -> Scores:
    """Scores, keys and the top-k choice; ``activation`` softmax, sigmoid, or none for logits that
    are scores in [0, 1] already."""
    choice = route_top_k(logits_TE, top_k=top_k, activation=activation)
    return Scores(choice.score_TE, choice.key_TE, choice.chosen_TE, top_k, renormalize)


def scores_from_probabilities(score_TE: Tensor, *, top_k: int, renormalize: str) -> Scores:
    """Keys and the top-k choice for given scores in [0, 1]."""
    return scores_from_logits(score_TE, activation="none", top_k=top_k, renormalize=renormalize)
