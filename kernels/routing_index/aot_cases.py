"""The kernels of the routing index, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.kernels.aot import AotCase
from distmoe.kernels.routing_index.triton_backend import (
    BLOCK_EXPERTS,
    BLOCK_TOKENS,
    padded_experts_and_tokens,
)
from distmoe.kernels.routing_index.triton_routing_index import (
    by_token_kernel,
    count_kernel,
    place_kernel,
)

BYTES, INT32 = "*u8:16", "*i32:16"


def cases() -> Iterator[AotCase]:
    """For 64 to 4096 experts, one number of them no power of two."""
    for experts in (64, 160, 256, 4096):
        tile = {"E": experts, "BT": BLOCK_TOKENS, "BE": BLOCK_EXPERTS}
        yield _case(
            f"routing_index count E{experts}",
            count_kernel,
            {"selected_ptr": BYTES, "counts_ptr": INT32, "T": "i32", "num_blocks": "i32"},
            tile,
        )
        yield _case(
            f"routing_index place E{experts}",
            place_kernel,
            {
                "selected_ptr": BYTES,
                "first_ptr": INT32,
                "token_ptr": INT32,
                "expert_ptr": INT32,
                "pair_ptr": INT32,
                "T": "i32",
                "num_blocks": "i32",
                "max_pairs": "i32",
            },
            tile,
        )
        padded, block = padded_experts_and_tokens(experts)
        yield _case(
            f"routing_index by_token E{experts}",
            by_token_kernel,
            {
                "selected_ptr": BYTES,
                "pair_ptr": INT32,
                "token_offset_ptr": INT32,
                "by_token_ptr": INT32,
                "T": "i32",
                "max_pairs": "i32",
            },
            {"E": experts, "E_POW2": padded, "BT": block},
        )


def _case(
    name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, int]
) -> AotCase:
    return AotCase(name, kernel, signature, constexprs, num_warps=4, num_stages=3, gemm=False)
