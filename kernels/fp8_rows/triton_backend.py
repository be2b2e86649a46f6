"""Launches of the kernels that pack and unpack rows."""

from __future__ import annotations

import triton
from torch import Tensor

from distmoe.kernels.fp8_rows import num_groups, packed_bytes
from distmoe.kernels.fp8_rows.triton_fp8_rows import (
    dequantize_rows_kernel,
    quantize_rows_kernel,
)

# Of one program: 32 values a thread.
GROUPS = 32
NUM_WARPS = 4


class TritonFp8Rows:
    """CUDA of compute capability 8.9 or newer, and the interpreter."""

    def quantize(self, x_TH: Tensor, packed_TW: Tensor) -> None:
        num_rows, hidden = x_TH.shape
        total = num_rows * num_groups(hidden)
        if total:
            quantize_rows_kernel[(triton.cdiv(total, GROUPS),)](
                x_TH, packed_TW, total, num_warps=NUM_WARPS, **sizes(hidden)
            )

    def dequantize(self, packed_UW: Tensor, out_RH: Tensor, token_R: Tensor | None) -> None:
        num_rows, hidden = out_RH.shape
        total = num_rows * num_groups(hidden)
        if total:
            dequantize_rows_kernel[(triton.cdiv(total, GROUPS),)](
                packed_UW, packed_UW if token_R is None else token_R, out_RH, total,
                GATHERED=token_R is not None, num_warps=NUM_WARPS, **sizes(hidden),
            )  # fmt: skip


def sizes(hidden: int) -> dict[str, int]:
    """What the kernels are compiled for."""
    return {
        "H": hidden,
        "W": packed_bytes(hidden),
        "B": num_groups(hidden),
        "GROUPS": GROUPS,
    }
