from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.config.sample_ranges import sample_ranges
from distmoe.data.mixture import MixtureSampler
from distmoe.data.sampler import BatchPositions, DataPosition, GlobalBatchSampler, permute

seeds = st.integers(0, 2**63)


@settings(deadline=None)
@given(st.integers(1, 3000), seeds, st.integers(0, 50))
def test_permutation_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(n), n, seed=seed, epoch=epoch)
    assert image.dtype == np.int64
    assert (np.sort(image) == np.arange(n)).all()


def test_permutation_of_a_huge_range_stays_inside() -> None:
    n = 3 * 10**15
    positions = np.array([0, 1, n // 2, n - 1])
    image = permute(positions, n, seed=1, epoch=0)
    assert ((image >= 0) & (image < n)).all()
    assert len(set(image)) == 4


def test_does_not_change_its_input_and_gives_fixed_values() -> None:
    positions = np.arange(10)
    image = permute(positions, 10, seed=1, epoch=0)
    assert (positions == np.arange(10)).all()
    # A change of the algorithm would give every resumed run another order.
    assert image.tolist() == [8, 6, 3, 5, 9, 2, 7, 4, 1, 0]


def test_shuffles_look_independent() -> None:
    n = 2000
    orders = [
        permute(np.arange(n), n, seed=seed, epoch=epoch) for seed in range(3) for epoch in range(3)
    ]
    identity = np.arange(n)
    for number, order in enumerate(orders):
        for other in [identity, *orders[:number]]:
            # Both are about N(0, 1 / n) and Poisson(1) for random permutations.
            assert abs(np.corrcoef(order, other)[0, 1]) < 5 / np.sqrt(n)
            assert (order == other).sum() < 12


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 60), seeds)
def test_each_epoch_holds_every_sample_once(num_samples: int, batch: int, seed: int) -> None:
    sampler = GlobalBatchSampler(num_samples, batch, seed)
    steps = -(-3 * num_samples // batch)
    stream = np.concatenate([sampler.indices(step) for step in range(steps)])
    for epoch in range(3):
        run = stream[epoch * num_samples : (epoch + 1) * num_samples]
        assert (np.sort(run) == np.arange(num_samples)).all()


def test_stream_does_not_depend_on_the_batch_size() -> None:
    small, large = GlobalBatchSampler(37, 4, 9), GlobalBatchSampler(37, 12, 9)
    joined = np.concatenate([small.indices(step) for step in range(9)])
    assert (joined == np.concatenate([large.indices(step) for step in range(3)])).all()


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        GlobalBatchSampler(sizes[0], sizes[1], 1)


skips = st.lists(st.tuples(st.integers(0, 90), st.integers(1, 30)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(skips, st.integers(1, 17), st.integers(0, 9))
def test_skipped_samples_are_left_out_and_no_other_moves(
    pairs: list[tuple[int, int]], batch: int, resumed: int
) -> None:
    """Against a list, from the start and after a resume with another batch size."""
    ranges = sample_ranges([f"{first}:{first + length}" for first, length in pairs])
    whole = BatchPositions(batch, skip=ranges)
    left = [n for n in range(1000) if not any(n in left_out for left_out in ranges)]
    taken = np.concatenate([whole.of(step) for step in range(12)])
    assert taken.tolist() == left[: 12 * batch]
    assert [whole.before(step + 1) for step in range(12)] == [
        left[(step + 1) * batch - 1] + 1 for step in range(12)
    ]
    left_out = [n for step in range(12) for part in whole.left_out(step) for n in part]
    assert sorted([*taken.tolist(), *left_out]) == list(range(whole.before(12)))
    begin = DataPosition(resumed, whole.before(resumed))
    again = BatchPositions(3, begin, ranges)
    assert (
        np.concatenate([again.of(resumed + step) for step in range(4)]).tolist()
        == (left[resumed * batch : resumed * batch + 12])
    )


def test_a_skip_that_is_gone_leaves_the_rest_where_it_was() -> None:
    """What a run has left out stays so when its setting is taken away."""
    with_skip = BatchPositions(4, skip=(range(6, 10),))
    without = BatchPositions(4, DataPosition(2, with_skip.before(2)))
    assert without.of(2).tolist() == with_skip.of(2).tolist() == [12, 13, 14, 15]


@pytest.mark.parametrize("shares", [[1], [3, 1]])
def test_all_samplers_skip(shares: list[int]) -> None:
    def samples(skip: tuple[range, ...], steps: range) -> set[int]:
        if len(shares) == 1:
            one = GlobalBatchSampler(500, 8, 1, skip=skip)
            return {int(n) for step in steps for n in one.indices(step)}
        mix = MixtureSampler([500, 500], shares, global_batch_size=8, seed=1, skip=skip)
        return {int(n) for step in steps for n in mix.indices(step)}

    # Whole batches are left out: steps 2 and 3.
    skipped = samples((range(16, 32),), range(6))
    assert skipped == samples((), range(2)) | samples((), range(4, 8))


@pytest.mark.parametrize("shares", [[1], [2, 3]])
def test_what_is_left_out_was_not_read(shares: list[int]) -> None:
    """Resumed behind the first stretch, without its setting."""
    ends = np.array([70 * (corpus + 1) for corpus in range(len(shares))])

    def sampler(begin: DataPosition, *skip: range) -> GlobalBatchSampler | MixtureSampler:
        if len(shares) == 1:
            return GlobalBatchSampler(70, 8, 1, begin, skip)
        return MixtureSampler(
            [70] * len(shares), shares, global_batch_size=8, seed=1, begin=begin, skip=skip
        )

    first = sampler(DataPosition(), range(5, 19), range(300, 400))
    resumed = sampler(first.positions.reached(4), range(61, 71))
    indices = [first.indices(step) for step in range(4)]
    indices += [resumed.indices(step) for step in range(4, 8)]
    corpora = np.searchsorted(ends, np.concatenate(indices), side="right")
    assert resumed.read(8) == np.bincount(corpora, minlength=len(shares)).tolist()
    assert resumed.positions.reached(8).left_out == (range(5, 19), range(61, 71))
