"""Forced balance, for benchmarks: tokens take the experts in turn, whatever their scores."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

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
        chosen_TE = self._take_turns(*logits_TE.shape, device=logits_TE.device)
        return replace(
            scores, key_TE=scores.key_TE + CHOSEN_KEY * chosen_TE.int(), chosen_TE=chosen_TE
        )

    def _take_turns(self, num_tokens: int, num_experts: int, *, device: torch.device) -> Tensor:
        """[T, E] bool."""
        first_T1 = torch.arange(num_tokens, device=device)[:, None] * self.top_k
        expert_E = torch.arange(num_experts, device=device)
        return (expert_E - first_T1) % num_experts < self.top_k
