"""The kernels of the arrangement, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.kernels.aot import AotCase
from distmoe.kernels.arrange_pairs.triton_arrange_pairs import move_kernel, segment_kernel
from distmoe.kernels.arrange_pairs.triton_backend import BLOCK_PAIRS, segment_config

INT32, INT64 = "*i32:16", "*i64:16"


def cases() -> Iterator[AotCase]:
    """For sources with one or two runs, a number that is no power of two, and many."""
    for width in (2, 3, 16):
        config = segment_config(width)
        num_warps = config.pop("num_warps")
        signature = {
            "message_ptr": INT32,
            "from_ptr": "*i64",
            "place_ptr": INT32,
            "scratch_ptr": INT32,
            "offset_ptr": INT32,
            "size_ptr": INT64,
            **_ints("stride_p", "stride_e", "rank", "P", "e", "C", "A", "steps"),
        }
        yield _case(f"arrange_pairs segment W{width}", segment_kernel, signature, config, num_warps)
        signature = {
            "message_ptr": INT32,
            "scratch_ptr": INT32,
            "row_ptr": INT32,
            "score_ptr": INT32,
            "place_ptr": INT64,
            **_ints("P", "e", "C", "L", "steps"),
        }
        config = {"W": width, "BLOCK": BLOCK_PAIRS}
        yield _case(f"arrange_pairs move W{width}", move_kernel, signature, config, 4)


def _ints(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _case(
    name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, int], warps: int
) -> AotCase:
    return AotCase(name, kernel, signature, constexprs, warps, num_stages=3, gemm=False)
