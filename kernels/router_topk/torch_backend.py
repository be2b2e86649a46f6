"""The router's choice in plain PyTorch, on any device and floating dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.router_topk import KEY_SCALE


class TorchRouterTopK:
    """The specification."""

    def forward(
        self, logits_TE: Tensor, *, top_k: int, activation: str, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        score_TE = _score(logits_TE, activation)
        turn_TE = turns(*score_TE.shape, top_k=top_k, device=score_TE.device)
        key_TE = torch.where(
            score_TE.isnan(), score_TE.shape[1] - 1 - turn_TE, integer_keys(score_TE, bias_E)
        )
        return score_TE, key_TE, choose_top_k(key_TE, top_k)

    def backward(self, dscore_TE: Tensor, score_TE: Tensor, *, activation: str) -> Tensor:
        if activation == "softmax":
            total_T1 = (dscore_TE * score_TE).sum(1, keepdim=True)
            return score_TE * (dscore_TE - total_T1)
        if activation == "sigmoid":
            return dscore_TE * score_TE * (1 - score_TE)
        return dscore_TE


def _score(logits_TE: Tensor, activation: str) -> Tensor:
    if activation == "softmax":
        return logits_TE.softmax(dim=1)
    if activation == "sigmoid":
        # A CPU takes other code for the last elements of a tensor, so that in fp32 a token's score
        # would depend on where the batch is cut.
        return logits_TE.double().sigmoid().to(logits_TE.dtype)
    return logits_TE.clone()


@torch.no_grad()
def integer_keys(score_TE: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """int32 keys of the module's formula, 0 for NaN; the product is exact, a power of two."""
    bounded_TE = score_TE.nan_to_num(0.0).clamp(0.0, 1.0)
    key_TE = (bounded_TE * KEY_SCALE).floor().to(torch.int32)
    return key_TE if bias_E is None else key_TE + bias_E


def turns(num_tokens: int, num_experts: int, *, top_k: int, device: torch.device) -> Tensor:
    """[T, E] int32 (e - t K) mod E: the turn in which token t would take expert e, if tokens one
    after the other took ``top_k`` experts each, whoever comes next."""
    first_T1 = torch.arange(num_tokens, device=device, dtype=torch.int32)[:, None] % num_experts
    expert_E = torch.arange(num_experts, device=device, dtype=torch.int32)
    return (expert_E - first_T1 * top_k) % num_experts


@torch.no_grad()
def choose_top_k(key_TE: Tensor, top_k: int) -> Tensor:
    """[T, E] bool: the ``top_k`` largest keys of a token, ties to the lower expert id."""
    num_experts = key_TE.shape[1]
    descending_E = torch.arange(num_experts - 1, -1, -1, device=key_TE.device)
    # Distinct numbers, so that the order of equal keys is not left to the sort.
    distinct_TE = key_TE.long() * num_experts + descending_E
    chosen_TK = distinct_TE.topk(top_k, dim=1).indices
    return torch.zeros_like(key_TE, dtype=torch.bool).scatter_(1, chosen_TK, True)
