"""Rows to packed rows and back. A program has GROUPS groups of 128 values, of one row or several;
a row of H values has B groups, and W bytes when it is packed."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(total, H: tl.constexpr, B: tl.constexpr, GROUPS: tl.constexpr):
    """Of this program's groups: row [GROUPS, 1], place in the row, whether there is one, columns
    [GROUPS, 128], and which of them the row has."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)[:, None]
    exists = group < total
    place = group % B
    col = place * 128 + tl.arange(0, 128)[None, :]
    return (group // B).to(tl.int64), place, exists, col, exists & (col < H)


# Sizes change from step to step: they must not make another kernel.
@triton.jit(do_not_specialize=["total"])
def quantize_rows_kernel(
    x_ptr, packed_ptr, total,
    H: tl.constexpr, W: tl.constexpr, B: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Bits as in `reference`."""
    row, place, exists, col, inside = places(total, H, B, GROUPS)
    x = tl.load(x_ptr + row * H + col, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    finite = largest < 0x7F800000
    exponent = tl.where(finite, tl.maximum(((largest + 0x1FFFFF) >> 23) - 8, 1), 255)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    code = tl.where(finite, x * inverse, 0.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(packed_ptr + row * W + col, code, mask=inside)
    tl.store(packed_ptr + row * W + H + place, exponent.to(tl.uint8), mask=exists)


@triton.jit(do_not_specialize=["total"])
def dequantize_rows_kernel(
    packed_ptr, token_ptr, out_ptr, total,
    H: tl.constexpr, W: tl.constexpr, B: tl.constexpr, GROUPS: tl.constexpr,
    GATHERED: tl.constexpr,
):  # fmt: skip
    """out[r] from the packed row r, or token[r]."""
    row, place, exists, col, inside = places(total, H, B, GROUPS)
    source = row
    if GATHERED:
        source = tl.load(token_ptr + row, mask=exists, other=0)
    exponent = tl.load(packed_ptr + source * W + H + place, mask=exists, other=0).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    code = tl.load(packed_ptr + source * W + col, mask=inside, other=0)
    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    tl.store(out_ptr + row * H + col, value.to(out_ptr.dtype.element_ty), mask=inside)
