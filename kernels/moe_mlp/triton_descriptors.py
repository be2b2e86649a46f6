"""What launches hand to kernels for weights and rows: TMA descriptors, or tensors as they are."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from distmoe.kernels.moe_mlp.tiles import TileConfig
from distmoe.kernels.moe_mlp.triton_operands import RAGGED_ROWS

# Bytes, of the address of what a descriptor describes.
TMA_ALIGNMENT = 16


def weight(w_eXY: Tensor, config: TileConfig, *, rows: int, cols: int) -> Tensor | TensorDescriptor:
    if not config.tma:
        return w_eXY
    w_eXY = aligned(w_eXY)
    return TensorDescriptor(w_eXY, list(w_eXY.shape), list(w_eXY.stride()), [1, rows, cols])


def stacked_weight(w_eGH: Tensor, I: int, config: TileConfig) -> Tensor | TensorDescriptor:
    """W_in whose tiles of gate and up, if it has both, come together."""
    if not config.tma:
        return w_eGH
    w_ePIH = aligned(w_eGH).view(len(w_eGH), -1, I, w_eGH.shape[2])
    block = [1, w_ePIH.shape[1], config.n, config.k]
    return TensorDescriptor(w_ePIH, list(w_ePIH.shape), list(w_ePIH.stride()), block)


def aligned(w: Tensor) -> Tensor:
    """``w``, or a copy that TMA can read: a view into a flat buffer of parameters of any size may
    begin anywhere."""
    return w.clone() if w.data_ptr() % TMA_ALIGNMENT else w


def ragged(v_LN: Tensor, config: TileConfig, *, rows: int, cols: int) -> Tensor | TensorDescriptor:
    if not config.tma:
        return v_LN
    return TensorDescriptor(v_LN, *ragged_shape(v_LN), [1, 1, rows, cols])


def ragged_shape(v_LN: Tensor) -> tuple[list[int], list[int]]:
    """Shape and strides of a descriptor by which a range of rows is read, with zeros behind it, or
    stored, and nothing behind it.

    Four dimensions: the first two wrap around 2^64 bytes so that (2^30, end, 2^30 - length + row)
    is the address of row end - length + row, and the third runs out of bounds where the range does.
    """
    most, stride = RAGGED_ROWS, v_LN.stride(0)
    shape = [0x7FFF0000, 0x7FFF0000, most, v_LN.shape[1]]
    return shape, [2**34 - stride, stride, stride, 1]
