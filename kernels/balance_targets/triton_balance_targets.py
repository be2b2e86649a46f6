"""The targets of `balance` by one program, which finds levels and thresholds bit by bit."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extra_level(gap, may, wanted, BITS: tl.constexpr):
    """The smallest d at which sum_r min(may, gap + d) reaches ``wanted``."""
    level = tl.zeros((), tl.int32)
    for i in tl.static_range(BITS):
        higher = level + (1 << (BITS - 1 - i))
        room = tl.sum(tl.minimum(may, gap + higher - 1))
        level = tl.where(room < wanted, higher, level)
    return level


@triton.jit
def largest(key, amount, BITS: tl.constexpr):
    """Of every row of distinct keys the ``amount`` [rows, 1] largest that are not negative; all of
    them if there are not so many."""
    limit = tl.zeros_like(amount)
    for i in range(BITS):
        higher = limit + (1 << (BITS - 1 - i))
        reached = tl.sum((key >= higher).to(tl.int32), axis=1, keep_dims=True)
        limit = tl.where(reached >= amount, higher, limit)
    return (key >= limit) & (amount > 0)


@triton.jit
def targets_kernel(
    freq_ptr, room_ptr, target_ptr,
    TILE: tl.constexpr, E: tl.constexpr, E_POW2: tl.constexpr, ROOMS: tl.constexpr,
    GROUPS: tl.constexpr, G_POW2: tl.constexpr, N_POW2: tl.constexpr, KEY_BITS: tl.constexpr,
    LEVEL_BITS: tl.constexpr,
):  # fmt: skip
    """target [E]: a row of lanes for every run of experts. ``room`` has ROOMS entries, E or 1."""
    run = tl.arange(0, G_POW2)[:, None]
    place = tl.arange(0, N_POW2)[None, :]
    exists = (run < GROUPS) & (place < E // GROUPS)
    expert = run * (E // GROUPS) + place
    freq = tl.load(freq_ptr + expert, mask=exists, other=0)
    room = tl.load(room_ptr + expert % ROOMS, mask=exists, other=0)
    floor = freq // TILE
    rest = freq - floor * TILE
    may = (rest > 0) & ((floor + 1) * TILE <= room)
    base = tl.sum(floor, axis=1, keep_dims=True)
    may_of_run = tl.sum(may.to(tl.int32), axis=1, keep_dims=True)
    half_up = (2 * tl.sum(rest) + TILE) // (2 * TILE)
    wanted = tl.minimum(half_up, tl.sum(may_of_run)).to(tl.int32)
    # A gap beyond a run's experts is as good as that many.
    gap = tl.minimum(tl.max(base) - base, N_POW2).to(tl.int32)
    cap = tl.minimum(may_of_run, gap + extra_level(gap, may_of_run, wanted, LEVEL_BITS))
    # Larger is first: by the remainder, then the lower expert.
    key = tl.where(may, rest.to(tl.int32) * E_POW2 + (E_POW2 - 1 - expert), -1)
    allowed = largest(key, cap, KEY_BITS)
    every = tl.reshape(tl.where(allowed, key, -1), (1, G_POW2 * N_POW2))
    up = largest(every, tl.zeros((1, 1), tl.int32) + wanted, KEY_BITS)
    up = tl.reshape(up.to(tl.int64), (G_POW2, N_POW2))
    tl.store(target_ptr + expert, (floor + up) * TILE, mask=exists)
