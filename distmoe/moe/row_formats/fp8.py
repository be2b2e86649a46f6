"""Rows that travel as e4m3 with a power of two for every 128 values: `kernels/fp8_rows`."""

from __future__ import annotations

from torch import Tensor

from distmoe.kernels.fp8_rows import dequantize_rows, packed_bytes, quantize_rows


class Fp8Rows:
    """x and dy alike: scales follow the size of a block, so that e5m2 would only round more."""

    def row_bytes(self, hidden: int, itemsize: int) -> int:
        return packed_bytes(hidden)

    def pack(self, v_TH: Tensor) -> Tensor:
        return quantize_rows(v_TH)

    def unpack(self, packed_UW: Tensor, out_RH: Tensor, token_R: Tensor | None = None) -> None:
        dequantize_rows(packed_UW, out_RH, token_R=token_R)
