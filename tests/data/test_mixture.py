"""The order of a mix, against its weights and against runs on each corpus alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.data.mixture import MixtureSampler, interleave
from distmoe.data.sampler import endless_shuffle

shares_of_mixes = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@settings(deadline=None)
@given(shares_of_mixes)
def test_every_start_of_the_stream_has_its_shares(shares: list[int]) -> None:
    order, period = interleave(shares), sum(shares)
    bound = 1 - Fraction(1, max(2, 2 * len(shares) - 2))
    taken = [0] * len(shares)
    for n, corpus in enumerate(order.tolist(), 1):
        taken[corpus] += 1
        for share, count in zip(shares, taken, strict=True):
            assert abs(count - Fraction(n * share, period)) <= bound
    assert taken == shares


def test_order_is_fixed() -> None:
    # A change of the schedule would give every resumed run another order.
    assert interleave([7, 3]).tolist() == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert interleave([1, 2, 3]).tolist() == [2, 1, 2, 0, 1, 2]


def make(sizes: list[int], shares: list[int], batch: int, seed: int = 3) -> MixtureSampler:
    return MixtureSampler(sizes, shares, global_batch_size=batch, seed=seed)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=2, max_size=5),
    st.integers(1, 50),
)
def test_each_corpus_is_read_as_if_alone(mix: list[tuple[int, int]], batch: int) -> None:
    sizes, shares = [size for size, _ in mix], [share for _, share in mix]
    sampler, steps = make(sizes, shares, batch), 7
    ends = np.cumsum(sizes)
    batches = [sampler.indices(step) for step in range(steps)]
    for corpus, size in enumerate(sizes):
        first, last = int(ends[corpus]) - size, int(ends[corpus])
        before = 0
        for step, indices in enumerate(batches):
            own = indices[(indices >= first) & (indices < last)] - first
            there = np.arange(before, before + len(own))
            # Inside of a batch the order is another one.
            assert sorted(own) == sorted(endless_shuffle(there, size, seed=3))
            before += len(own)
            assert sampler.read(step + 1)[corpus] == before
            assert abs(before - batch * (step + 1) * shares[corpus] / sum(shares)) < 1


def test_a_step_needs_no_step_before_it() -> None:
    one, other = make([50, 20, 9], [5, 3, 2], 8), make([50, 20, 9], [5, 3, 2], 8)
    forward = [one.indices(step).tolist() for step in range(30)]
    assert [other.indices(step).tolist() for step in reversed(range(30))][::-1] == forward
    assert make([50, 20, 9], [5, 3, 2], 8, seed=4).indices(0).tolist() != forward[0]


def test_no_rank_always_meets_the_same_corpus() -> None:
    sampler = make([1000, 1000], [1, 1], 8)
    from_first = np.stack([sampler.indices(step) < 1000 for step in range(200)])
    assert (from_first.sum(1) == 4).all()
    share = from_first.mean(0)
    assert ((share > 0.35) & (share < 0.65)).all()


@pytest.mark.parametrize(("sizes", "shares"), [([3, 0], [1, 1]), ([3, 3], [1, 0]), ([3], [1, 1])])
def test_impossible_mixes_are_refused(sizes: list[int], shares: list[int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        make(sizes, shares, 4)
