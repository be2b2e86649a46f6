"""An accumulator of tensor cores cut in two, without an element that changes its thread."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(v, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right BN / 2 columns."""
    return tl.split(tl.permute(tl.reshape(v, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def row_halves(v, BM: tl.constexpr, BN: tl.constexpr):
    """The rows of `first_rows`, and those 8 below them: a thread has one of each in every 16."""
    first, second = tl.split(tl.permute(tl.reshape(v, (BM // 16, 2, 8, BN)), (0, 2, 3, 1)))
    return tl.reshape(first, (BM // 2, BN)), tl.reshape(second, (BM // 2, BN))


@triton.jit
def first_rows(BM: tl.constexpr):
    """The first 8 of every 16 rows."""
    row = tl.arange(0, BM // 2)
    return row // 8 * 16 + row % 8
