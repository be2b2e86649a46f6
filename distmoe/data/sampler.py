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
    """Where a run goes on in its stream of samples: ``samples`` of them were taken in the first
    ``step`` global batches, which may have had another size than those after them."""

    step: int = 0
    samples: int = 0

    def samples_before(self, step: int, global_batch_size: int) -> int:
        """Samples taken before global batch ``step``."""
        return self.samples + (step - self.step) * global_batch_size


FROM_THE_START = DataPosition()


class GlobalBatchSampler:
    """Global batches of sample numbers; the same for every number of ranks.

    Batch ``step`` holds the global_batch_size positions of the endless shuffle after those before
    it, counted from ``begin`` on; a batch may straddle two epochs.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int,
        begin: DataPosition = FROM_THE_START,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"the number of samples is {num_samples}; it must be at least 1")
        if global_batch_size < 1:
            raise ValueError(
                f"train.global_batch_size is {global_batch_size}; it must be at least 1"
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed, self.begin = seed, begin

    def indices(self, step: int) -> NDArray[np.int64]:
        """Sample numbers of a global batch, [global_batch_size]; ``step`` counts from 0."""
        first = self.begin.samples_before(step, self.global_batch_size)
        positions = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        return endless_shuffle(positions, self.num_samples, seed=self.seed)

    def taken(self, steps: int) -> list[int]:
        """Samples of each corpus, here of the only one, in the first ``steps`` global batches."""
        return [self.begin.samples_before(steps, self.global_batch_size)]


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
