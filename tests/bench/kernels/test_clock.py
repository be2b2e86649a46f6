"""Statistics of samples, and the order of measurement."""

from collections.abc import Callable

import pytest

from distmoe.bench.kernels.clock import Samples, cpu_clock, round_robin


def test_summary() -> None:
    summary = Samples([5.0, 1.0, 2.0, 4.0, 3.0]).summary()
    assert (summary["median_ms"], summary["min_ms"]) == (3.0, 1.0)
    assert (summary["q1_ms"], summary["q3_ms"]) == (2.0, 4.0)
    assert Samples([7.0]).quartiles == (7.0, 7.0)


def test_cpu_clock_counts_milliseconds_of_the_work_only() -> None:
    done: list[int] = []
    spent = cpu_clock()(lambda: done.append(1))
    assert done == [1]
    assert 0 < spent < 1


def test_calls_take_turns_and_none_is_always_first() -> None:
    log: list[str] = []

    def clock(work: Callable[[], object]) -> float:
        work()
        return float(len(log))

    samples = round_robin(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")}, rounds=2, clock=clock
    )
    assert "".join(log) == "ab" + "ab" + "ba"
    assert samples["a"].ms == pytest.approx([3, 6])
