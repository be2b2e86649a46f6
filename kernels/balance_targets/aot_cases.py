"""The kernel of the targets of `balance`, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.kernels.aot import AotCase
from distmoe.kernels.balance_targets.triton_backend import targets_config
from distmoe.kernels.balance_targets.triton_balance_targets import targets_kernel

INT64 = "*i64:16"


def cases() -> Iterator[AotCase]:
    """For 64 to 4096 experts, one number of them no power of two, and one run or many."""
    for experts, groups in ((64, 8), (160, 5), (256, 1), (256, 64), (4096, 64)):
        config = targets_config(experts, tile=128, groups=groups)
        num_warps = config.pop("num_warps")
        for rooms in (1, experts):
            yield AotCase(
                f"balance_targets E{experts} runs {groups} rooms {rooms}",
                targets_kernel,
                {"freq_ptr": INT64, "room_ptr": INT64, "target_ptr": INT64},
                {**config, "ROOMS": rooms},
                num_warps,
                num_stages=3,
                gemm=False,
            )
