"""Rows as 8-bit numbers (e4m3) with a power of two for every 128 values, as they travel.

Of a group with the largest magnitude m the scale is the smallest 2^k with m <= 448 * 2^k, and a
value becomes the e4m3 number next to value / 2^k, ties to even. So a value is rounded once: to
divide by a power of two is exact, and e4m3 * 2^k is a number of bf16. What was unpacked gives the
same values when it is packed again. A group with inf or NaN becomes NaN, all of it.

A packed row: H bytes of e4m3, ceil(H / 128) bytes k + 127 (E8M0 of the OCP MX formats, whose 255 is
NaN), and bytes that nobody reads up to a multiple of 16.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distmoe.kernels.backends import e4m3_or_torch
from distmoe.registry import FP8_ROWS_BACKENDS

# Values that share a scale: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
GROUP = 128
# Of packed rows, so that loads of 16 bytes are aligned.
ALIGNMENT = 16
# Rows are gathered and sent in words of int64, faster than byte by byte.
WORD = 8


class Fp8RowKernels(Protocol):
    """One backend. Rows are contiguous."""

    def quantize(self, x_TH: Tensor, packed_TW: Tensor) -> None:
        """fp32, bf16 or fp16 rows into bytes, uint8."""
        ...

    def dequantize(self, packed_UW: Tensor, out_RH: Tensor, token_R: Tensor | None) -> None:
        """Into rows of any of these dtypes. ``token_R`` int64: the packed row of every row of out;
        None: the same."""
        ...


def packed_bytes(hidden: int) -> int:
    """Bytes of a packed row of ``hidden`` values."""
    used = hidden + num_groups(hidden)
    return -(-used // ALIGNMENT) * ALIGNMENT


def num_groups(hidden: int) -> int:
    """Scales of a row."""
    return -(-hidden // GROUP)


def quantize_rows(x_TH: Tensor, *, backend: str = "auto") -> Tensor:
    """Packed rows [T, W], int64 words. Nothing waits for the device."""
    num_rows, hidden = x_TH.shape
    packed_TW = torch.empty(
        num_rows, packed_bytes(hidden) // WORD, dtype=torch.int64, device=x_TH.device
    )
    _load(backend, x_TH.device).quantize(x_TH.contiguous(), packed_TW.view(torch.uint8))
    return packed_TW


def dequantize_rows(
    packed_UW: Tensor, out_RH: Tensor, *, token_R: Tensor | None = None, backend: str = "auto"
) -> None:
    """See `Fp8RowKernels`, of packed rows in words; ``out_RH`` is contiguous."""
    _load(backend, out_RH.device).dequantize(packed_UW.view(torch.uint8), out_RH, token_R)


def _load(backend: str, device: torch.device) -> Fp8RowKernels:
    name = e4m3_or_torch(device) if backend == "auto" else backend
    rows: Fp8RowKernels = FP8_ROWS_BACKENDS.load(name)()
    return rows
