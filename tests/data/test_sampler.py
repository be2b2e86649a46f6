from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.data.sampler import GlobalBatchSampler, permute

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
