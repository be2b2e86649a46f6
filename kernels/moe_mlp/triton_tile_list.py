"""The tile list of a call: which pairs of which expert each program of a GEMM handles."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


# Sizes change from step to step: they must not make another kernel.
@triton.jit(
    do_not_specialize=["num_tiles", "stride"], do_not_specialize_on_alignment=["bounds_ptr"]
)
def tile_list_kernel(
    bounds_ptr, tile_ptr, num_tiles, stride, EXACT: tl.constexpr, E: tl.constexpr,
    E_POW2: tl.constexpr, BM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """int32 [3, num_tiles]: expert, first pair, and the pair after the last one of the range; for
    every block, ``stride`` apart.

    ``num_tiles`` is a bound known on the host; EXACT: that of the block's own pairs. Entries past
    the last tile have expert -1 and no pairs. Every program counts the tiles of all experts itself:
    no atomics and no second pass.
    """
    bounds_ptr += tl.program_id(1) * 2 * E
    tile_ptr += tl.program_id(1) * stride
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    e = tl.arange(0, E_POW2)
    begin_e = tl.load(bounds_ptr + e, mask=e < E, other=0)
    end_e = tl.load(bounds_ptr + E + e, mask=e < E, other=0)
    if EXACT:
        pairs = tl.sum(end_e - begin_e)
        num_tiles = (pairs + BM - 1) // BM + tl.minimum(pairs, E)
    tiles_e = (end_e - begin_e + BM - 1) // BM
    passed = tl.cumsum(tiles_e, axis=0)[None, :] <= slot[:, None]
    expert = tl.sum(passed.to(tl.int32), axis=1)
    tiles_before = tl.sum(tl.where(passed, tiles_e[None, :], 0), axis=1)
    exists = expert < E
    begin = tl.load(bounds_ptr + expert, mask=exists, other=0) + (slot - tiles_before) * BM
    end = tl.load(bounds_ptr + E + expert, mask=exists, other=0)
    inside = slot < num_tiles
    tl.store(tile_ptr + slot, tl.where(exists, expert, -1), mask=inside)
    tl.store(tile_ptr + num_tiles + slot, begin, mask=inside)
    tl.store(tile_ptr + 2 * num_tiles + slot, end, mask=inside)


@triton.jit
def tile_at(tile_ptr, num_tiles, tile):
    """(expert, first pair, pair after the range's last, whether there is such a tile).

    All three numbers decide about the last one: were it the expert alone, the compiler would load
    the others only behind the return of a program without a tile, and wait for memory twice.
    """
    expert = tl.load(tile_ptr + tile)
    begin = tl.load(tile_ptr + num_tiles + tile)
    end = tl.load(tile_ptr + 2 * num_tiles + tile)
    return expert, begin, end, (expert >= 0) & (begin < end)
