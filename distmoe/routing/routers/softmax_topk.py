"""Softmax over all experts, then top-k (Switch, OLMoE, Qwen3-MoE)."""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.routers import Scores, scores_from_logits


class SoftmaxTopK:
    """score = softmax(logits) over E; weights as ``renormalize`` says."""

    forced = False

    def __init__(self, *, top_k: int, renormalize: str) -> None:
        self.top_k, self.renormalize = top_k, renormalize

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
        return scores_from_logits(
            logits_TE,
            activation="softmax",
            top_k=self.top_k,
            renormalize=self.renormalize,
            bias_E=bias_E,
        )
