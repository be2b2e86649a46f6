"""Learning-rate schedules at their corners."""

from __future__ import annotations

import pytest

from distmoe.registry import SCHEDULES

OPTIONS = {"steps": 100, "warmup_steps": 10, "decay_steps": 20, "min_lr_ratio": 0.1}


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_warm_up_starts_above_zero_and_reaches_the_peak(name: str) -> None:
    schedule = SCHEDULES.load(name)
    factors = [schedule(step, **OPTIONS) for step in range(100)]
    assert 0 < factors[0] < factors[5] < factors[9] < 1
    assert factors[10] == pytest.approx(1)
    assert max(factors) <= 1


def test_ends() -> None:
    last = {name: SCHEDULES.load(name)(99, **OPTIONS) for name in SCHEDULES}
    assert last == pytest.approx({"constant": 1.0, "cosine": 0.1, "wsd": 0.1})


def test_wsd_is_stable_until_its_decay() -> None:
    wsd = SCHEDULES.load("wsd")
    assert wsd(79, **OPTIONS) == 1
    assert wsd(89, **OPTIONS) == pytest.approx(0.55)
    assert wsd(95, **{**OPTIONS, "decay_steps": 0}) == pytest.approx(0.1 + 0.9 * 0.4)


def test_cosine_is_half_way_in_the_middle() -> None:
    assert SCHEDULES.load("cosine")(10 + 89 / 2, **OPTIONS) == pytest.approx(0.55)
