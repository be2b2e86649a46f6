"""Routers: logits -> scores, integer keys, and the top-k choice.

A router is built with (top_k, renormalize) and called with logits_TE (fp32) and the experts' bias.
Decisions are made on integer keys, key = floor(score * 2^24) + bias, so that they depend neither on
the order of a sum nor on the number of ranks. Ties go to the lower expert id inside a token. The
bias (arXiv 2408.15664) is for the choice only: it never enters a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from distmoe.kernels.router_topk import route_top_k
from distmoe.registry import ROUTERS

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Scores:
    """``score_TE`` fp32, differentiable; ``key_TE`` int32; ``chosen_TE`` bool, top_k a token.
    ``allowed_TE`` bool: pairs that may be chosen or added, the others have key NOTHING of
    kernels/round_select; None: all.

    ``renormalize``: what a pair's weight is divided by; see `weight`. ``sums_to_one``: a token's
    scores do. ``scale``: factor on every weight. ``bias_E`` int32: what ``key_TE`` has above the
    integer scores; None: nothing, or keys that a forced router has set freely.
    """

    score_TE: Tensor
    key_TE: Tensor
    chosen_TE: Tensor
    top_k: int
    renormalize: str
    allowed_TE: Tensor | None = None
    sums_to_one: bool = True
    scale: float = 1.0
    bias_E: Tensor | None = None

    @property
    def prob_TE(self) -> Tensor:
        """[T, E] fp32, differentiable: what the load-balance loss averages, scores that sum to 1
        over the experts of a token."""
        if self.sums_to_one:
            return self.score_TE
        return self.score_TE / self.score_TE.sum(1, keepdim=True).clamp(min=TINY)

    def weight(self, selected_TE: Tensor) -> Tensor:
        """[T, E] fp32 weights. ``topk``: score over the sum of the token's top-k scores, the same
        scale for pairs that rounding added; ``assigned``: over the sum of the selected; ``none``:
        the score. All times ``scale``."""
        weight_TE = self.score_TE
        if self.renormalize != "none":
            counted_TE = self.chosen_TE if self.renormalize == "topk" else selected_TE
            total_T = torch.where(counted_TE, self.score_TE, 0.0).sum(1, keepdim=True)
            weight_TE = weight_TE / total_T.clamp(min=TINY)
        return weight_TE if self.scale == 1.0 else weight_TE * self.scale


class Router(Protocol):
    """One way from logits, and the bias int32 [E] if there is one, to scores.

    ``forced``: the choice does not follow the scores, so that the figures of a run are stamped.
    """

    forced: ClassVar[bool]

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores: ...


def make_router(name: str, *, top_k: int, renormalize: str) -> Router:
    """The router called ``name``; ValueError for settings that it cannot honour."""
    router: Router = ROUTERS.load(name)(top_k=top_k, renormalize=renormalize)
    return router


def is_forced(name: str) -> bool:
    """Whether the router called ``name`` chooses without regard to the scores."""
    router: Router = ROUTERS.load(name)
    return router.forced


def scores_from_logits(
    logits_TE: Tensor,
    *,
    activation: str,
    top_k: int,
    renormalize: str,
    bias_E: Tensor | None = None,
) -> Scores:
    """Scores, keys and the top-k choice; ``activation`` softmax, sigmoid, or none for logits that
    are scores in [0, 1] already."""
    choice = route_top_k(logits_TE, top_k=top_k, activation=activation, bias_E=bias_E)
    return Scores(
        choice.score_TE,
        choice.key_TE,
        choice.chosen_TE,
        top_k,
        renormalize,
        sums_to_one=activation != "sigmoid",
        bias_E=bias_E,
    )


def scores_from_probabilities(score_TE: Tensor, *, top_k: int, renormalize: str) -> Scores:
    """Keys and the top-k choice for given scores in [0, 1]."""
    return scores_from_logits(score_TE, activation="none", top_k=top_k, renormalize=renormalize)
