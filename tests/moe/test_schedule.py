"""The order of work: what every rank sends is what the others wait for, in the same step."""

from __future__ import annotations

import itertools

import pytest

from distmoe.moe.schedule import ORDERS, Part, Schedule, auto_schedule

CASES = list(itertools.product([2, 3, 4, 8], ORDERS, [1, 2, 3, 7]))


@pytest.mark.parametrize(("num_ranks", "order", "steps"), CASES)
def test_sends_meet_receives(num_ranks: int, order: str, steps: int) -> None:
    schedule = Schedule(order=order, steps=steps)
    blocks = [schedule.blocks(rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(of_rank) for of_rank in blocks}) == 1
    for at_once in zip(*blocks, strict=True):
        sent = {(rank, p.rank, p.run) for rank, step in enumerate(at_once) for p in step.sends}
        received = {
            (p.rank, rank, p.run)
            for rank, step in enumerate(at_once)
            for p in step.receives
            if p.rank != rank
        }
        assert sent == received


@pytest.mark.parametrize(("num_ranks", "order", "steps"), CASES)
def test_every_run_arrives_once(num_ranks: int, order: str, steps: int) -> None:
    schedule = Schedule(order=order, steps=steps)
    for rank in range(num_ranks):
        arriving = [part for step in schedule.blocks(rank, num_ranks) for part in step.receives]
        others = [Part(p, c) for p in range(num_ranks) for c in range(schedule.runs()) if p != rank]
        assert sorted(arriving, key=str) == sorted([Part(rank, 0), Part(rank, 1), *others], key=str)


def test_own_halves_come_first_and_last() -> None:
    blocks = Schedule(order="source", steps=3).blocks(2, 4)
    assert blocks[0].receives == [Part(2, 0)]
    assert blocks[-1].receives == [Part(2, 1)]
    assert [[p.rank for p in step.receives] for step in blocks[1:-1]] == [[1], [0], [3]]
    assert [[p.rank for p in step.sends] for step in blocks[1:-1]] == [[3], [0], [1]]


def test_steps_by_source_are_at_most_the_other_ranks() -> None:
    assert len(Schedule(order="source", steps=7).blocks(0, 4)) == 2 + 3
    assert len(Schedule(order="source", steps=2).blocks(0, 4)) == 2 + 2
    assert len(Schedule(order="tokens", steps=7).blocks(0, 4)) == 2 + 7


def test_auto() -> None:
    assert auto_schedule("auto", "auto", 0, num_ranks=4) == Schedule("rank", "source", 3)
    assert auto_schedule("auto", "auto", 0, num_ranks=16) == Schedule("rank", "tokens", 4)
    assert auto_schedule("copies", "tokens", 2, num_ranks=2) == Schedule("copies", "tokens", 2)
    with pytest.raises(ValueError, match="level is 'x'; it must be one of auto, copies, rank"):
        auto_schedule("x", "auto", 0, num_ranks=2)
    with pytest.raises(ValueError, match="steps is -1; it must be at least 0"):
        auto_schedule("rank", "auto", -1, num_ranks=2)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("runs", [1, 3])
def test_over_nodes(order: str, runs: int) -> None:
    """Twelve ranks, four a node: three peers one by one, then two nodes, in so many runs."""
    schedule = auto_schedule("node", order, runs, num_ranks=12, ranks_per_node=4)
    assert schedule.runs() == runs
    blocks = schedule.blocks(5, 12)
    assert [[p.rank for p in step.receives] for step in blocks[1:4]] == [[4], [7], [6]]
    far = blocks[4:-1]
    assert all(step.relayed for step in far)
    # Nodes 0 and 2 of rank 5's tokens; sent to the rank of its place, from all ranks of the node.
    assert [[p.rank for p in step.sends] for step in far] == [[9]] * runs + [[1]] * runs
    assert [[p.rank for p in step.receives] for step in far[:runs]] == [[0, 1, 2, 3]] * runs
    assert [step.receives[0].run for step in far] == [*range(runs)] * 2


def test_without_nodes_a_row_goes_to_a_rank() -> None:
    assert auto_schedule("auto", "auto", 0, num_ranks=8, ranks_per_node=4).level == "node"
    for per_node in (0, 8, 1, 3):
        assert (
            auto_schedule("auto", "auto", 0, num_ranks=8, ranks_per_node=per_node).level == "rank"
        )
    with pytest.raises(ValueError, match="ranks_per_node is 3; it must divide the 8 ranks"):
        auto_schedule("node", "auto", 0, num_ranks=8, ranks_per_node=3)
