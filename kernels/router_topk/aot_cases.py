"""The router kernels, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.kernels.aot import AotCase
from distmoe.kernels.router_topk import KEY_SCALE
from distmoe.kernels.router_topk.triton_backend import row_config
from distmoe.kernels.router_topk.triton_router_topk import (
    router_topk_backward_kernel,
    router_topk_kernel,
)

FP32 = "*fp32:16"


def cases() -> Iterator[AotCase]:
    """For 64 to 4096 experts, one number of them no power of two, and top 1 to 32."""
    for experts in (64, 128, 160, 256, 512, 4096):
        for top_k in (1, 8, 32):
            yield _forward(experts, top_k, "softmax", biased=False)
        yield _forward(experts, 8, "sigmoid", biased=True)
        for activation in ("softmax", "sigmoid"):
            yield _backward(experts, activation)


def _forward(experts: int, top_k: int, activation: str, *, biased: bool) -> AotCase:
    config = row_config(experts)
    return AotCase(
        name=f"router_topk {activation} E{experts} K{top_k}",
        kernel=router_topk_kernel,
        signature={
            "logits_ptr": FP32,
            "bias_ptr": "*i32:16",
            "score_ptr": FP32,
            "key_ptr": "*i32:16",
            "chosen_ptr": "*u8:16",
            "T": "i32",
        },
        constexprs={
            "E": experts,
            "E_POW2": config["E_POW2"],
            "K": top_k,
            "ACTIVATION": activation,
            "BIASED": biased,
            "SCALE": KEY_SCALE,
            "BT": config["BT"],
        },
        num_warps=config["num_warps"],
        num_stages=3,
        gemm=False,
    )


def _backward(experts: int, activation: str) -> AotCase:
    config = row_config(experts)
    return AotCase(
        name=f"router_topk backward {activation} E{experts}",
        kernel=router_topk_backward_kernel,
        signature={"dscore_ptr": FP32, "score_ptr": FP32, "dlogits_ptr": FP32, "T": "i32"},
        constexprs={
            "E": experts,
            "E_POW2": config["E_POW2"],
            "ACTIVATION": activation,
            "BT": config["BT"],
        },
        num_warps=config["num_warps"],
        num_stages=3,
        gemm=False,
    )
