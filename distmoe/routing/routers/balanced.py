"""Forced balance, for benchmarks: tokens take the experts in turn, whatever their scores."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from distmoe.kernels.router_topk.torch_backend import turns
from distmoe.routing.routers import Scores, scores_from_logits

# Above every score, and within the keys that rounding tells apart.
CHOSEN_KEY = 1 << 25


class Balanced:
    """The token at place t of its rank chooses the experts (t K + j) mod E, j = 0..K-1.

    Weights are those of softmax_topk for that choice, with gradients; the bias is ignored.
    """

    forced = True

    def __init__(self, *, top_k: int, renormalize: str) -> None:
        self.top_k, self.renormalize = top_k, renormalize

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
        scores = scores_from_logits(
            logits_TE, activation="softmax", top_k=self.top_k, renormalize=self.renormalize
        )
        turn_TE = turns(*logits_TE.shape, top_k=self.top_k, device=logits_TE.device)
        chosen_TE = turn_TE < self.top_k
        return replace(
            scores, key_TE=scores.key_TE + CHOSEN_KEY * chosen_TE.int(), chosen_TE=chosen_TE
        )
