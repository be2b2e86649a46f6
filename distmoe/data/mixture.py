"""Which corpus each sample of a mix comes from, and which of its samples it is.

After any n samples corpus i of k, of weight w_i, has given c_i of them with
|c_i - n w_i| <= 1 - u, u = 1 / (2k - 2), the best bound that holds for all weights (Tijdeman, "The
chairman assignment problem", Discrete Mathematics 32, 1980). That is to say that sample j of corpus
i, counted from 0, stands at a position n, counted from 1, with

    (j + u) / w_i <= n <= (j + 1 - u) / w_i + 1

A schedule that keeps to all of these windows exists, so taking the open window that closes first
finds one. Weights are whole shares of a period, after which it all begins anew; so any position is
found without those before it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distmoe.data.sampler import (
    FROM_THE_START,
    BatchPositions,
    DataPosition,
    endless_shuffle,
    permute,
)


def interleave(shares: Sequence[int]) -> NDArray[np.int64]:
    """The corpus of every position of one period, [sum(shares)]."""
    period, spread = sum(shares), max(1, 2 * len(shares) - 2)

    def opens(corpus: int, sample: int) -> int:
        return -(-(sample * spread + 1) * period // (shares[corpus] * spread))

    def closes(corpus: int, sample: int) -> int:
        return ((sample + 1) * spread - 1) * period // (shares[corpus] * spread) + 1

    order = np.empty(period, np.int64)
    taken = [0] * len(shares)
    later = [(opens(corpus, 0), corpus) for corpus in range(len(shares))]
    heapq.heapify(later)
    now: list[tuple[int, int]] = []
    for position in range(period):
        while later and later[0][0] <= position + 1:
            corpus = heapq.heappop(later)[1]
            heapq.heappush(now, (closes(corpus, taken[corpus]), corpus))
        order[position] = corpus = heapq.heappop(now)[1]
        taken[corpus] += 1
        heapq.heappush(later, (opens(corpus, taken[corpus]), corpus))
    return order


class MixtureSampler:
    """Global batches of a mix; the same for every number of ranks, and a function of the step.

    Samples are numbered one corpus after the other: corpus i has the numbers from the sum of
    ``num_samples`` before it on. Each corpus is read in its own epochs, in the order in which a run
    on it alone would read it. Inside of a global batch the samples are shuffled: where weights and
    ranks have a common divisor, a rank would always meet the same corpus.
    """

    def __init__(
        self,
        num_samples: Sequence[int],
        shares: Sequence[int],
        *,
        global_batch_size: int,
        seed: int,
        begin: DataPosition = FROM_THE_START,
        skip: tuple[range, ...] = (),
    ) -> None:
        if min(num_samples) < 1 or min(shares) < 1 or len(num_samples) != len(shares):
            raise ValueError(
                f"corpora have {list(num_samples)} samples and shares {list(shares)}; each must "
                "have one of both, at least 1"
            )
        self.num_samples = sum(num_samples)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.positions = BatchPositions(global_batch_size, begin, skip)
        self._samples = list(num_samples)
        self._shares = np.array(shares, np.int64)
        self._first = np.cumsum([0, *num_samples[:-1]])
        self._order = interleave(shares)
        self._before = np.empty_like(self._order)
        for corpus, share in enumerate(shares):
            self._before[self._order == corpus] = np.arange(share)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Sample numbers of a global batch, [global_batch_size]; ``step`` counts from 0."""
        size = self.global_batch_size
        order = permute(np.arange(size, dtype=np.int64), size, seed=self.seed, epoch=step)
        periods, within = np.divmod(self.positions.of(step)[order], len(self._order))
        corpus_B = self._order[within]
        number_B = periods * self._shares[corpus_B] + self._before[within]
        indices = np.empty_like(number_B)
        for corpus, samples in enumerate(self._samples):
            here = corpus_B == corpus
            shuffled = endless_shuffle(number_B[here], samples, seed=self.seed)
            indices[here] = self._first[corpus] + shuffled
        return indices

    def read(self, steps: int) -> list[int]:
        """Samples of each corpus that the first ``steps`` global batches have taken."""
        reached = self.positions.reached(steps)
        counts = self._of_first(reached.samples)
        for left_out in reached.left_out:
            counts -= self._of_first(left_out.stop) - self._of_first(left_out.start)
        whole: list[int] = counts.tolist()
        return whole

    def _of_first(self, samples: int) -> NDArray[np.int64]:
        """How many of the first ``samples`` positions are of each corpus."""
        periods, rest = divmod(samples, len(self._order))
        counts: NDArray[np.int64] = periods * self._shares
        counts += np.bincount(self._order[:rest], minlength=len(counts))
        return counts
