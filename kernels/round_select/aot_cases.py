"""The selection kernels, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.kernels.aot import AotCase
from distmoe.kernels.round_select import NOTHING
from distmoe.kernels.round_select.triton_backend import (
    BLOCK_EXPERTS,
    BLOCK_TOKENS,
    CONSTANTS,
    MERGE_BITS,
    WHOLE_COLUMN_OF_BEST,
    WHOLE_COLUMN_OF_TAKE,
    column_config,
    merge_config,
)
from distmoe.kernels.round_select.triton_merge import merge_kernel
from distmoe.kernels.round_select.triton_round_select import (
    flip_kernel,
    gather_best_kernel,
    priority_kernel,
    sort_kernel,
    take_kernel,
)

BYTES, INT32 = "*u8:16", "*i32:16"


def cases() -> Iterator[AotCase]:
    """For columns that fit into registers and one that does not, and for 64 to 4096 experts."""
    for tokens in (2048, 16384, 24576, 65536):
        yield _column(
            f"round_select take T{tokens}",
            take_kernel,
            {
                "priority_ptr": INT32,
                "amount_ptr": INT32,
                "adds_ptr": BYTES,
                "taken_ptr": BYTES,
                "T": "i32",
            },
            column_config(tokens, WHOLE_COLUMN_OF_TAKE),
        )
        yield _column(
            f"round_select best T{tokens}",
            gather_best_kernel,
            {"priority_ptr": INT32, "best_ptr": INT32, "T": "i32", "num": "i32"},
            column_config(tokens, WHOLE_COLUMN_OF_BEST),
        )
    for ranks in (2, 8, 64, 512):
        yield _merge(ranks, 127)
    sort = {"NOTHING": NOTHING, "BLOCK": 128}
    yield _case("round_select sort 127", sort_kernel, {"values_ptr": INT32, "num": "i32"}, sort, 1)
    for experts in (64, 256, 4096):
        tile = {"E": experts, "BT": BLOCK_TOKENS, "BE": BLOCK_EXPERTS}
        yield _case(
            f"round_select priority E{experts}",
            priority_kernel,
            {
                "key_ptr": INT32,
                "chosen_ptr": BYTES,
                "adds_ptr": BYTES,
                "priority_ptr": INT32,
                "T": "i32",
            },
            {**tile, "NOTHING": NOTHING},
            4,
        )
        yield _case(
            f"round_select flip E{experts}",
            flip_kernel,
            {"chosen_ptr": BYTES, "taken_ptr": BYTES, "selected_ptr": BYTES, "T": "i32"},
            tile,
            4,
        )


def _merge(num_ranks: int, num: int) -> AotCase:
    constexprs = {"NOTHING": NOTHING, "BITS": MERGE_BITS, **merge_config(num_ranks, num)}
    signature = {
        "best_ptr": INT32,
        "adds_ptr": BYTES,
        "amount_ptr": "*i64:16",
        "accepted_ptr": "*i64:16",
        "P": "i32",
        "num_experts": "i32",
    }
    name = f"round_select merge {num_ranks} of {num}"
    return _case(name, merge_kernel, signature, constexprs, constexprs.pop("num_warps"))


def _column(
    name: str, kernel: object, signature: dict[str, str], config: dict[str, int | bool]
) -> AotCase:
    constexprs = {**CONSTANTS, **config}
    return _case(name, kernel, signature, constexprs, num_warps=constexprs.pop("num_warps"))


def _case(
    name: str,
    kernel: object,
    signature: dict[str, str],
    constexprs: dict[str, int | bool],
    num_warps: int,
) -> AotCase:
    return AotCase(name, kernel, signature, constexprs, num_warps, num_stages=3, gemm=False)
