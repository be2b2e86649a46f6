"""The order of samples: a function of (seed, step), without state and without a table.

A Feistel network of four rounds permutes [0, 4^b), the smallest such range that holds n; an index
that lands outside [0, n) is permuted again (cycle walking), which gives a permutation of [0, n)
(Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROUNDS = 4
_WORD = (1 << 64) - 1


def permute(positions: NDArray[np.int64], n: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """Where each position of [0, n) goes in the shuffle of this seed and epoch."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    indices = _feistel(positions.astype(np.uint64), half_bits, keys)
    outside = indices >= n
    while outside.any():
        indices[outside] = _feistel(indices[outside], half_bits, keys)
        outside = indices >= n
    return indices.astype(np.int64)


def endless_shuffle(
    positions: NDArray[np.int64], num_samples: int, *, seed: int
) -> NDArray[np.int64]:
    """The sample at each position of an endless stream, whose epochs are shuffles of all samples.

    Position p is in epoch p // num_samples.
    """
    epochs, within = np.divmod(positions, num_samples)
    indices = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permute(within[here], num_samples, seed=seed, epoch=epoch)
    return indices


@dataclass(frozen=True)
class DataPosition:
    """Where a run goes on in its stream of samples: the first ``step`` global batches, which may
    have had another size than those after them, have taken, or left out, ``samples`` of them;
    ``left_out``: which they left out, as far as a checkpoint knows."""

    step: int = 0
    samples: int = 0
    left_out: tuple[range, ...] = ()


FROM_THE_START = DataPosition()


@dataclass(frozen=True)
class BatchPositions:
    """Positions in the stream of samples that global batches take, one after the other from
    ``begin`` on, but for those in ``skip``: ranges that rise and do not touch."""

    global_batch_size: int
    begin: DataPosition = FROM_THE_START
    skip: tuple[range, ...] = ()

    def of(self, step: int) -> NDArray[np.int64]:
        """Of a global batch, rising, [global_batch_size]; ``step`` counts from 0."""
        first = self._count_before(step)
        return self._over_skipped(np.arange(first, first + self.global_batch_size, dtype=np.int64))

    def before(self, step: int) -> int:
        """How many positions lie before global batch ``step``, up to the last one that is taken."""
        last = np.array([self._count_before(step) - 1], dtype=np.int64)
        return int(self._over_skipped(last)[0]) + 1

    def left_out(self, step: int) -> tuple[range, ...]:
        """Of ``skip`` what lies between the last sample before global batch ``step`` and its own
        last one."""
        return self._skipped(self.before(step), self.before(step + 1))

    def reached(self, step: int) -> DataPosition:
        """Where a run goes on after global batch ``step`` - 1."""
        samples = self.before(step)
        left_out = (*self.begin.left_out, *self._skipped(self.begin.samples, samples))
        return DataPosition(step, samples, left_out)

    def _skipped(self, first: int, end: int) -> tuple[range, ...]:
        parts = (range(max(r.start, first), min(r.stop, end)) for r in self.skip)
        return tuple(part for part in parts if part)

    def _count_before(self, step: int) -> int:
        return self.begin.samples + (step - self.begin.step) * self.global_batch_size

    def _over_skipped(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where these positions lie once ``skip`` has made room for what comes after it."""
        for left_out in self.skip:
            first = max(left_out.start, self.begin.samples)
            behind = positions >= first
            positions = positions + behind * max(0, left_out.stop - first)
        return positions


class GlobalBatchSampler:
    """Global batches of sample numbers; the same for every number of ranks.

    Batch ``step`` holds the global_batch_size positions of the endless shuffle after those before
    it, counted from ``begin`` on, without those in ``skip``; a batch may straddle two epochs.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        begin: DataPosition = FROM_THE_START,
        skip: tuple[range, ...] = (),
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"the number of samples is {num_samples}; it must be at least 1")
        if global_batch_size < 1:
            raise ValueError(
                f"train.global_batch_size is {global_batch_size}; it must be at least 1"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.positions = BatchPositions(global_batch_size, begin, skip)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Sample numbers of a global batch, [global_batch_size]; ``step`` counts from 0."""
        return endless_shuffle(self.positions.of(step), self.num_samples, seed=self.seed)

    def read(self, steps: int) -> list[int]:
        """Samples of each corpus, here of the only one, that the first ``steps`` global batches
        have taken."""
        reached = self.positions.reached(steps)
        return [reached.samples - sum(map(len, reached.left_out))]


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    # Mixed one after the other, so that (seed, epoch) and (epoch, seed) have different keys.
    state = _mix(np.array([seed & _WORD], np.uint64)) + np.uint64(epoch & _WORD)
    keys = []
    for _ in range(ROUNDS):
        state = _mix(state)
        keys.append(state[0])
    return keys


def _feistel(
    values: NDArray[np.uint64], half_bits: int, keys: list[np.uint64]
) -> NDArray[np.uint64]:
    """A permutation of [0, 4^half_bits)."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
