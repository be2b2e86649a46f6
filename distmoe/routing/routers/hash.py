"""A choice at random that depends on nothing but the token, for tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distmoe.kernels.router_topk import KEY_SCALE
from distmoe.kernels.router_topk.torch_backend import choose_top_k
from distmoe.routing.routers import Scores, scores_from_logits
from distmoe.routing.splitmix import GOLDEN, mix, shift_right


class Hash:
    """key = hash of the bits of the token's logits and of the expert, even over 0..2^24-1.

    Weights are those of softmax_topk for that choice, with gradients; the bias is ignored.
    """

    forced = True

    def __init__(self, *, top_k: int, renormalize: str) -> None:
        self.top_k, self.renormalize = top_k, renormalize

    @torch.no_grad()
    def _keys(self, logits_TE: Tensor) -> Tensor:
        """[T, E] int32."""
        num_experts = logits_TE.shape[1]
        bits_TE = logits_TE.float().contiguous().view(torch.int32).long()
        stream_E = torch.arange(1, num_experts + 1, device=logits_TE.device) * GOLDEN
        state_T1 = mix(mix(stream_E + bits_TE).sum(1, keepdim=True))
        drawn_TE = shift_right(mix(state_T1 + stream_E), 64 - KEY_SCALE.bit_length() + 1)
        return drawn_TE.int()

    def __call__(self, logits_TE: Tensor, bias_E: Tensor | None = None) -> Scores:
        scores = scores_from_logits(
            logits_TE, activation="softmax", top_k=self.top_k, renormalize=self.renormalize
        )
        key_TE = self._keys(logits_TE)
        return replace(scores, key_TE=key_TE, chosen_TE=choose_top_k(key_TE, self.top_k))
