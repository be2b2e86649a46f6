"""Where every segment of the messages goes, by one program; then every pair goes there.

Tables in scratch memory, int32, of W runs a source: ``begin`` [P e + 1], the first pair of every
source and expert in the messages; ``end`` [P W], the first row behind every run; ``row_shift``
[P W] and ``pair_shift`` [P e W], by what the rows of a run and the pairs of a segment move.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_at(message_ptr, pair, source, C):
    """The row of a pair: in front of it are the pairs before it and the heads up to its source."""
    return message_ptr + (pair.to(tl.int64) + (source + 1) * C) * 2


@triton.jit
def find_begins(from_ptr, begin_ptr, stride_p, stride_e, P, e, BLOCK: tl.constexpr):
    """``begin`` from the pairs of every source and expert."""
    passed = tl.zeros((), tl.int32)
    for first in range(0, P * e, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        place = (lane // e).to(tl.int64) * stride_p + (lane % e).to(tl.int64) * stride_e
        count = tl.load(from_ptr + place, mask=lane < P * e, other=0).to(tl.int32)
        tl.store(begin_ptr + lane, passed + tl.cumsum(count, axis=0) - count, mask=lane < P * e)
        passed += tl.sum(count)
    tl.store(begin_ptr + P * e, passed)


@triton.jit
def find_ends(
    message_ptr, begin_ptr, end_ptr, relayed_ptr, rank, P, e, C,
    W: tl.constexpr, W_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``end`` and the rows to pass on, from the heads."""
    run = tl.arange(0, W_POW2)[None, :]
    for first in range(0, P, BLOCK):
        source = first + tl.arange(0, BLOCK)[:, None]
        told = (source < P) & (run < C)
        before = tl.load(begin_ptr + source * e, mask=source < P, other=0)
        head = message_ptr + (before.to(tl.int64) + source * C + run) * 2
        rows = tl.load(head, mask=told, other=0)
        relayed = tl.load(head + 1, mask=told, other=0)
        tl.store(relayed_ptr + source * C + run, relayed.to(tl.int64), mask=told)
        own = tl.sum(rows, axis=1)[:, None]
        halves = tl.where(run == 0, own - own // 2, tl.where(run == 1, own // 2, 0))
        end = tl.cumsum(tl.where(source == rank, halves, rows), axis=1)
        tl.store(end_ptr + source * W + run, end, mask=(source < P) & (run < W))


@triton.jit
def run_at(place_ptr, end_ptr, number, exists, W: tl.constexpr):
    """Of an arrival: its place, and the first row of its run and the one behind it."""
    place = tl.load(place_ptr + number, mask=exists, other=0)
    first = tl.load(end_ptr + place - 1, mask=exists & (place % W > 0), other=0)
    return place, first, tl.load(end_ptr + place, mask=exists, other=0)


@triton.jit
def place_rows(
    place_ptr, end_ptr, row_shift_ptr, rows_ptr, A, W: tl.constexpr, BLOCK: tl.constexpr
):
    """``row_shift`` and the rows of every arrival."""
    passed = tl.zeros((), tl.int32)
    for first in range(0, A, BLOCK):
        number = first + tl.arange(0, BLOCK)
        exists = number < A
        place, begin, end = run_at(place_ptr, end_ptr, number, exists, W)
        rows = end - begin
        shift = passed + tl.cumsum(rows, axis=0) - rows - begin
        tl.store(row_shift_ptr + place, shift, mask=exists)
        tl.store(rows_ptr + number, rows.to(tl.int64), mask=exists)
        passed += tl.sum(rows)


@triton.jit
def halved(message_ptr, row, low, high, source, C):
    """One step of the search for the first pair in low..high whose row is at least ``row``."""
    middle = (low + high) // 2
    is_open = low < high
    here = tl.load(row_at(message_ptr, middle, source, C), mask=is_open, other=0)
    low = tl.where(is_open & (here < row), middle + 1, low)
    return low, tl.where(is_open & (here >= row), middle, high)


@triton.jit
def pairs_of_rows(message_ptr, first_row, end_row, low, high, source, C, steps):
    """Of low..high, the pairs of a source and expert, the first one of the rows first_row..end_row
    and the one behind the last."""
    begin, begin_high, end, end_high = low, high, low, high
    for _ in range(steps):
        # Both at once: a step waits for memory.
        begin, begin_high = halved(message_ptr, first_row, begin, begin_high, source, C)
        end, end_high = halved(message_ptr, end_row, end, end_high, source, C)
    return begin, end


# Sizes change from step to step: they must not make another kernel.
@triton.jit(
    do_not_specialize=["stride_p", "stride_e", "rank", "P", "e", "C", "A", "steps"],
    do_not_specialize_on_alignment=["from_ptr"],
)
def segment_kernel(
    message_ptr, from_ptr, place_ptr, scratch_ptr, offset_ptr, size_ptr,
    stride_p, stride_e, rank, P, e, C, A, steps,
    W: tl.constexpr, W_POW2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All tables; offsets [e + 1]; sizes: rows [A], counts [A, e], relayed [P, C], int64.

    One program: sums over all segments, which are few. ``steps``: bits of the most pairs of a
    source.
    """
    begin_ptr, end_ptr = scratch_ptr, scratch_ptr + P * e + 1
    row_shift_ptr, pair_shift_ptr = end_ptr + P * W, end_ptr + 2 * P * W
    find_begins(from_ptr, begin_ptr, stride_p, stride_e, P, e, BLOCK)
    # Its threads read what others of them wrote.
    tl.debug_barrier()
    relayed_ptr = size_ptr + A + A * e
    find_ends(
        message_ptr, begin_ptr, end_ptr, relayed_ptr, rank, P, e, C, W, W_POW2, BLOCK // W_POW2
    )
    tl.debug_barrier()
    place_rows(place_ptr, end_ptr, row_shift_ptr, size_ptr, A, W, BLOCK)
    passed = tl.zeros((), tl.int32)
    for first in range(0, e * A, BLOCK):
        lane = first + tl.arange(0, BLOCK)
        exists = lane < e * A
        expert, number = lane // A, lane % A
        place, first_row, end_row = run_at(place_ptr, end_ptr, number, exists, W)
        source = place // W
        segment = source * e + expert
        low = tl.load(begin_ptr + segment, mask=exists, other=0)
        high = tl.load(begin_ptr + segment + 1, mask=exists, other=0)
        begin, end = pairs_of_rows(
            message_ptr, first_row, end_row, low, high, source, C, steps
        )  # fmt: skip
        count = end - begin
        goes_to = passed + tl.cumsum(count, axis=0) - count
        tl.store(pair_shift_ptr + segment * W + place % W, goes_to - begin, mask=exists)
        tl.store(size_ptr + A + number * e + expert, count.to(tl.int64), mask=exists)
        tl.store(offset_ptr + expert, goes_to, mask=exists & (number == 0))
        passed += tl.sum(count)
    tl.store(offset_ptr + e, passed)


@triton.jit(do_not_specialize=["P", "e", "C", "L", "steps"])
def move_kernel(
    message_ptr, scratch_ptr, row_ptr, score_ptr, place_ptr, P, e, C, L, steps,
    W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every pair to its place. ``score``: bits; ``steps``: bits of P e."""
    begin_ptr, end_ptr = scratch_ptr, scratch_ptr + P * e + 1
    row_shift_ptr, pair_shift_ptr = end_ptr + P * W, end_ptr + 2 * P * W
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pair < L
    # The last segment that begins at the pair or before it: one that is not empty.
    low = tl.zeros_like(pair)
    high = low + P * e
    for _ in range(steps):
        middle = (low + high) // 2
        begin = tl.load(begin_ptr + middle, mask=exists, other=0)
        low = tl.where(begin <= pair, middle, low)
        high = tl.where(begin <= pair, high, middle)
    source = low // e
    pointer = row_at(message_ptr, pair, source, C)
    row = tl.load(pointer, mask=exists, other=0)
    score = tl.load(pointer + 1, mask=exists, other=0)
    run = tl.zeros_like(pair)
    for i in tl.static_range(W - 1):
        run += (row >= tl.load(end_ptr + source * W + i, mask=exists, other=0)).to(tl.int32)
    place = pair + tl.load(pair_shift_ptr + low * W + run, mask=exists, other=0)
    row += tl.load(row_shift_ptr + source * W + run, mask=exists, other=0)
    tl.store(row_ptr + place, row, mask=exists)
    tl.store(score_ptr + place, score, mask=exists)
    tl.store(place_ptr + pair, place.to(tl.int64), mask=exists)
