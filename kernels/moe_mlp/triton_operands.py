"""How GEMM kernels read their operands and store rows. M, N, K are the BLAS letters here.

Weights and contiguous rows come and go by TMA descriptors where the hardware has TMA, by pointers
elsewhere; gathered rows always by pointers, which become asynchronous copies of 16 bytes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a ragged descriptor: coordinate 2^30 - length + row runs out of bounds exactly where a
# range of `length` rows ends.
RAGGED_ROWS = 2**30


@triton.jit
def _inside(
    pointers, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What ``pointers`` name; zero from row ROWS or column COLS on, which there is not if WHOLE."""
    if WHOLE:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=(rows < ROWS)[:, None] & (cols < COLS)[None, :], other=0.0)
    return values


@triton.jit
def weight_tile(
    w, expert, row, col, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_ROWS, BLOCK_COLS] of w [e, ROWS, COLS] at (row, col) of an expert, zero outside.

    WHOLE: the caller asks for nothing outside.
    """
    if TMA:
        tile = w.load([expert, row, col]).reshape(BLOCK_ROWS, BLOCK_COLS)
    else:
        rows, cols = row + tl.arange(0, BLOCK_ROWS), col + tl.arange(0, BLOCK_COLS)
        base = w + expert.to(tl.int64) * (ROWS * COLS)
        pointers = base + rows.to(tl.int64)[:, None] * COLS + cols[None, :]
        tile = _inside(pointers, rows, cols, ROWS, COLS, WHOLE)
    return tile


@triton.jit
def stacked_tiles(
    w, expert, row, col, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, WHOLE: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """[PARTS * BLOCK_ROWS, BLOCK_COLS] of w [e, PARTS, ROWS, COLS]: the tiles at (row, col) of the
    parts of an expert, one below the other; zero outside of a part. WHOLE as in `weight_tile`."""
    if TMA:
        tile = w.load([expert, 0, row, col]).reshape(PARTS * BLOCK_ROWS, BLOCK_COLS)
    else:
        place = tl.arange(0, PARTS * BLOCK_ROWS)
        rows, cols = row + place % BLOCK_ROWS, col + tl.arange(0, BLOCK_COLS)
        base = w + expert.to(tl.int64) * (PARTS * ROWS * COLS)
        in_expert = (place // BLOCK_ROWS * ROWS + rows).to(tl.int64)
        pointers = base + in_expert[:, None] * COLS + cols[None, :]
        tile = _inside(pointers, rows, cols, ROWS, COLS, WHOLE)
    return tile


@triton.jit
def row_tile(
    v, begin, end, row, col, COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """[BLOCK_ROWS, BLOCK_COLS] of v [L, COLS] from ``begin + row``, zero from ``end`` on."""
    if TMA:
        # RAGGED_ROWS
        most: tl.constexpr = 1073741824
        tile = v.load([most, end, most - (end - begin) + row, col]).reshape(BLOCK_ROWS, BLOCK_COLS)
    else:
        rows, cols = begin + row + tl.arange(0, BLOCK_ROWS), col + tl.arange(0, BLOCK_COLS)
        pointers = v + rows.to(tl.int64)[:, None] * COLS + cols[None, :]
        if COLS % BLOCK_COLS == 0:
            tile = tl.load(pointers, mask=(rows < end)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows < end)[:, None] & (cols < COLS)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(
    tile, out, begin, end, col, COLS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Put ``tile`` [BLOCK_ROWS, BLOCK_COLS] into out [L, COLS] from (begin, col) on; what lies from
    row ``end`` or column COLS on is dropped."""
    if TMA:
        # RAGGED_ROWS
        most: tl.constexpr = 1073741824
        tile = tile.to(out.dtype).reshape(1, 1, BLOCK_ROWS, BLOCK_COLS)
        out.store([most, end, most - (end - begin), col], tile)
    else:
        place = tl.arange(0, BLOCK_ROWS)[:, None]
        cols = col + tl.arange(0, BLOCK_COLS)[None, :]
        live = begin + place < end
        inside = live if COLS % BLOCK_COLS == 0 else live & (cols < COLS)
        # 64-bit for where the tile begins, 32-bit inside it, which takes half of the registers.
        pointers = out + begin.to(tl.int64) * COLS + (place * COLS + cols)
        tl.store(pointers, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def gathered_pointers(v_ptr, row_ptr, pair, live, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Pointers [BLOCK, BLOCK_COLS] to the first columns of v[row_ptr[pair]]; row 0 if not live."""
    row = tl.load(row_ptr + pair, mask=live, other=0).to(tl.int64)
    return v_ptr + row[:, None] * COLS + tl.arange(0, BLOCK_COLS)[None, :]


@triton.jit
def columns_from(pointers, col, COLS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Load gathered rows at columns ``col`` and on, zero past the last."""
    if COLS % BLOCK_COLS == 0:
        tile = tl.load(pointers + col)
    else:
        inside = col + tl.arange(0, BLOCK_COLS) < COLS
        tile = tl.load(pointers + col, mask=inside[None, :], other=0.0)
    return tile
