"""Packed rows in plain torch: the specification, and what runs where Triton has no e4m3."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distmoe.kernels.fp8_rows import GROUP, num_groups

# Bits of a positive fp32: its exponent begins at bit 23, and these are of inf.
MANTISSA_BITS = 23
INFINITE = 0x7F800000
# What carries into the exponent if the mantissa is above that of 448, which is 1.75 * 2^8.
ABOVE_448 = 0x1FFFFF
EXPONENT_OF_448 = 8
NOT_A_SCALE = 255


class TorchFp8Rows:
    """Any device."""

    def quantize(self, x_TH: Tensor, packed_TW: Tensor) -> None:
        num_rows, hidden = x_TH.shape
        groups = num_groups(hidden)
        padded = F.pad(x_TH.float(), (0, groups * GROUP - hidden)).view(num_rows, groups, GROUP)
        # As integers, magnitudes are in the same order, and NaN is the largest.
        largest_TB = (padded.view(torch.int32) & 0x7FFFFFFF).amax(2)
        finite_TB = largest_TB < INFINITE
        exponent_TB = ((largest_TB + ABOVE_448) >> MANTISSA_BITS) - EXPONENT_OF_448
        # Neither the scale nor its inverse may be subnormal.
        exponent_TB = torch.where(finite_TB, exponent_TB.clamp(min=1), NOT_A_SCALE)
        inverse_TB = ((254 - exponent_TB) << MANTISSA_BITS).view(torch.float32)
        scaled = torch.where(finite_TB[..., None], padded * inverse_TB[..., None], 0.0)
        code_TH = scaled.to(torch.float8_e4m3fn).flatten(1)[:, :hidden]
        packed_TW[:, :hidden] = code_TH.view(torch.uint8)
        packed_TW[:, hidden : hidden + groups] = exponent_TB.to(torch.uint8)

    def dequantize(self, packed_UW: Tensor, out_RH: Tensor, token_R: Tensor | None) -> None:
        if token_R is not None:
            packed_UW = packed_UW.index_select(0, token_R)
        hidden = out_RH.shape[1]
        exponent_RB = packed_UW[:, hidden : hidden + num_groups(hidden)].int()
        # 255 gives inf, and 0, the codes of such a block, times inf is NaN.
        scale_RB = (exponent_RB << MANTISSA_BITS).view(torch.float32)
        code_RH = packed_UW[:, :hidden].contiguous().view(torch.float8_e4m3fn)
        scale_RH = scale_RB.repeat_interleave(GROUP, dim=1)[:, :hidden]
        out_RH.copy_(code_RH.float() * scale_RH)
