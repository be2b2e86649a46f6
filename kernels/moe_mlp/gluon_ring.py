"""The ring of shared-memory stages of a program's producer and consumers. M, N, K: BLAS letters.

A program runs in partitions of warps: a producer that loads, and one or two groups of consumers
that multiply and store. All walk the same tiles, and the same steps of each. Step t of the program,
counted over its tiles, uses stage t % STAGES for the (t // STAGES)-th time. A stage has two
barriers:

- ``full``: consumers wait for it before they read. It takes 1 arrival of the producer's thread that
  announces the bytes of TMA, these bytes, and where rows are gathered 1 arrival of every producing
  thread, which its asynchronous copies give when they have landed.
- ``empty``: the producer waits for it before it loads the next use. It takes 1 arrival of the group
  that had the step, when its products have read the stage.

A barrier's phase ends when all arrivals are there. A wait names the parity of the phase that has to
be over: use u of a stage waits for phase u of ``full``, and for phase u - 1 of ``empty``, which a
fresh barrier lets pass. A parity does not tell phase u from u - 2: nobody may wait for a phase
before the one two back is known to be over, or the wait ends too early.

With two groups the tiles go to one and the other in turn: one multiplies while the other stores. A
group begins when the other has met every step of the tile before; the other's barrier ``done``,
1 arrival a tile, says so. Without it a group would begin while the ring is uses behind, which is
the case above.

A group issues the products of step t, waits until only these are running, and gives the stage of
step t - 1 back: the tensor cores never run dry, and nothing that they still read is overwritten.

Threads' writes, among them the copies of gathered rows, and tensor cores see shared memory through
different proxies: the consumer puts a fence between its wait and its products. TMA needs none.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """(full, empty, done); ARRIVALS: those that end a phase of ``full``."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=ARRIVALS)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(done.index(group), count=1)
    # TMA arrives through another proxy than the one that wrote them.
    fence_async_shared()
    return full, empty, done


@gluon.jit
def end_barriers(barriers, STAGES: gl.constexpr):
    full, empty, done = barriers
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(stage))
        mbarrier.invalidate(empty.index(stage))
    for group in gl.static_range(2):
        mbarrier.invalidate(done.index(group))


@gluon.jit
def next_stage(stage, parity, STAGES: gl.constexpr):
    """(stage, parity of its use) of the step after."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, parity ^ 1, parity)


@gluon.jit
def multiply(
    first, second, barriers, turn, step, steps, acc,
    STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr,
    FIRST_TRANSPOSED: gl.constexpr, SECOND_TRANSPOSED: gl.constexpr, FENCE: gl.constexpr,
):  # fmt: skip
    """acc plus the products of a tile: ``steps`` steps, the first of which is ``step``.

    ``first`` [STAGES, M, K], or [STAGES, K, M] if transposed; ``second`` [STAGES, K, N], or
    [STAGES, N, K]. ``turn``: tiles of the program before this one. FENCE: threads wrote an operand.
    """
    full, empty, done = barriers
    if GROUPS == 2:
        # The other's phase turn // 2 for the second group, one less for the first.
        mbarrier.wait(done.index(1 - GROUP), ((turn // 2) & 1) ^ (1 - GROUP))
    stage, parity = step % STAGES, (step // STAGES) & 1
    before = stage
    for k in range(0, steps):
        mbarrier.wait(full.index(stage), parity)
        if FENCE:
            fence_async_shared()
        a, b = first.index(stage), second.index(stage)
        if FIRST_TRANSPOSED:
            a = a.permute((1, 0))
        if SECOND_TRANSPOSED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
        before = stage
        stage, parity = next_stage(stage, parity, STAGES)
    if GROUPS == 2:
        mbarrier.arrive(done.index(GROUP), count=1)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    return acc
