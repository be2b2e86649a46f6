"""A sigmoid of every expert by itself, then top-k (DeepSeek-V3, arXiv 2412.19437)."""

from __future__ import annotations

from torch import Tensor

from distmoe.routing.routers import Scores, scores_from_logits


class SigmoidTopK:
    """score = sigmoid(logits); weights as ``renormalize`` says (DeepSeek-V3: ``topk``)."""

    forced = False

    def __init__(self, *, top_k: int, renormalize: str) -> None:
        self.top_k, self.renormalize = top_k, renormalize

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
        return scores_from_logits(
            logits_TE,
            activation="sigmoid",
            top_k=self.top_k,
            renormalize=self.renormalize,
            bias_E=bias_E,
        )
