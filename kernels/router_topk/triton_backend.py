"""Launches of the router kernels: a few whole rows a program, so a row never meets another."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from distmoe.kernels.router_topk import KEY_SCALE
from distmoe.kernels.router_topk.triton_router_topk import (
    router_topk_backward_kernel,
    router_topk_kernel,
)

# Tokens times experts of one program.
ELEMENTS = 1024


class TritonRouterTopK:
    """fp32 logits on CUDA, ROCm and in the interpreter."""

    def forward(
        self, logits_TE: Tensor, *, top_k: int, activation: str, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_experts = logits_TE.shape
        logits_TE = logits_TE.contiguous()
        score_TE = torch.empty_like(logits_TE)
        key_TE = torch.empty_like(logits_TE, dtype=torch.int32)
        chosen_TE = torch.empty_like(logits_TE, dtype=torch.bool)
        if num_tokens:
            config = row_config(num_experts)
            biased = bias_E is not None
            router_topk_kernel[(triton.cdiv(num_tokens, int(config["BT"])),)](
                logits_TE, bias_E if biased else key_TE, score_TE, key_TE,
                chosen_TE.view(torch.uint8), num_tokens,
                E=num_experts, K=top_k, ACTIVATION=activation, BIASED=biased,
                SCALE=KEY_SCALE, **config,
            )  # fmt: skip
        return score_TE, key_TE, chosen_TE

    def backward(self, dscore_TE: Tensor, score_TE: Tensor, *, activation: str) -> Tensor:
        num_tokens, num_experts = score_TE.shape
        if activation == "none" or not num_tokens:
            return dscore_TE
        dlogits_TE = torch.empty_like(score_TE)
        config = row_config(num_experts)
        router_topk_backward_kernel[(triton.cdiv(num_tokens, int(config["BT"])),)](
            dscore_TE.contiguous(), score_TE, dlogits_TE, num_tokens,
            E=num_experts, ACTIVATION=activation, **config,
        )  # fmt: skip
        return dlogits_TE


def row_config(num_experts: int) -> dict[str, int]:
    """Rows of one program, and its warps: 8 elements a thread."""
    padded = triton.next_power_of_2(num_experts)
    num_warps = min(max(padded // 256, 4), 16)
    return {"E_POW2": padded, "BT": max(1, ELEMENTS // padded), "num_warps": num_warps}
