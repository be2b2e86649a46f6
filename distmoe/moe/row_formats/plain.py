"""Rows that travel in a dtype of torch: that of the computation, or bf16 where that is shorter."""

from __future__ import annotations

import torch
from torch import Tensor


class PlainRows:
    """Of the dtype that ``dtype`` makes of the computed one."""

    def dtype(self, computed: torch.dtype) -> torch.dtype:
        raise NotImplementedError

    def row_bytes(self, hidden: int, itemsize: int) -> int:
        raise NotImplementedError

    def pack(self, v_TH: Tensor) -> Tensor:
        return v_TH.to(self.dtype(v_TH.dtype)).contiguous()

    def unpack(self, packed_UW: Tensor, out_RH: Tensor, token_R: Tensor | None = None) -> None:
        out_RH.copy_(packed_UW if token_R is None else packed_UW.index_select(0, token_R))


class ComputedRows(PlainRows):
    """As the experts compute with them."""

    def dtype(self, computed: torch.dtype) -> torch.dtype:
        return computed

    def row_bytes(self, hidden: int, itemsize: int) -> int:
        return hidden * itemsize


class Bf16Rows(PlainRows):
    """bf16 for fp32, to the nearest, ties to even."""

    def dtype(self, computed: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if computed.itemsize > torch.bfloat16.itemsize else computed

    def row_bytes(self, hidden: int, itemsize: int) -> int:
        return hidden * min(itemsize, torch.bfloat16.itemsize)
