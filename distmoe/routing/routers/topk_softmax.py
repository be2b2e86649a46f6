"""Top-k, then softmax over the chosen logits (Mixtral)."""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.routers import Scores, scores_from_logits


class TopKSoftmax:
    """Softmax over the chosen logits is the full softmax divided by its top-k sum, so only the
    normalisation differs from softmax_topk, and keys and added pairs keep one scale."""

    forced = False

    def __init__(self, *, top_k: int, renormalize: str) -> None:
        if renormalize != "topk":
            raise ValueError(
                f"moe.renormalize is {renormalize!r}; with router 'topk_softmax' it must be 'topk'"
            )
        self.top_k = top_k

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
        return scores_from_logits(
            logits_TE,
            activation="softmax",
            top_k=self.top_k,
            renormalize="topk",
            bias_E=bias_E,
        )
