"""The router logits and their gradients, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.kernels.aot import AotCase
from distmoe.kernels.router_logits.triton_backend import BLOCKS, LAUNCH
from distmoe.kernels.router_logits.triton_router_logits import dw_kernel, dx_kernel, logits_kernel

BF16, FP32 = "*bf16:16", "*fp32:16"


def cases() -> Iterator[AotCase]:
    """Few experts and many, and widths that no tile divides."""
    matrices = {"dlogits_ptr": FP32, "T": "i32"}
    for experts, hidden in ((8, 768), (64, 1536), (256, 4096), (96, 1000)):
        for name, kernel, signature in (
            ("", logits_kernel, {"x_ptr": BF16, "w_ptr": BF16, "logits_ptr": FP32, "T": "i32"}),
            ("dx ", dx_kernel, {**matrices, "w_ptr": BF16, "dx_ptr": BF16}),
            (
                "dw ",
                dw_kernel,
                {**matrices, "x_ptr": BF16, "partial_ptr": FP32, "rows_per_slice": "i32"},
            ),
        ):
            shape = {"H": hidden, "E": experts}
            yield _case(f"router_logits {name}E{experts} H{hidden}", kernel, signature, shape)


def _case(name: str, kernel: object, signature: dict[str, str], shape: dict[str, int]) -> AotCase:
    return AotCase(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs={**shape, **BLOCKS},
        num_warps=LAUNCH["num_warps"],
        num_stages=LAUNCH["num_stages"],
        gemm=True,
        # The gradient is cut into parts between its load and its product.
        pipelined=kernel is logits_kernel,
    )
