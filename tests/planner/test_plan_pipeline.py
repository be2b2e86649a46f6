"""Layers one after the other, by hand: what hides what, and which rank decides."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.planner.collective_time import Transfer
from distmoe.planner.expert_time import ExpertPass, ExpertTimes
from distmoe.planner.pipeline_time import Stage, micro_batch_s

ROOT = Stage(gather=Transfer(2.0), reduce=Transfer(2.0))


def transfer(seconds: float) -> Transfer:
    return Transfer(seconds, node_s=seconds)


def experts_of(forward: float, backward: float, *, sent_s: float = 0.0) -> ExpertTimes:
    """Seconds of the busiest rank."""
    return ExpertTimes(
        ExpertPass(0.0, 0.0, forward, transfer(sent_s)),
        ExpertPass(0.0, 0.0, backward, transfer(sent_s)),
    )


def test_gathers_are_hidden_behind_the_block_before() -> None:
    """Forward: root 2, block 3 while nothing runs; then 10 and 5 s of computing. Backward: the last
    block is gathered behind the head, the other behind it; of the reductions the last is seen, and
    of the first block's what the root does not hide."""
    block = Stage(10.0, 20.0, False, Transfer(3.0), Transfer(3.0), Transfer(4.0))
    stages = [ROOT, block, block, Stage(5.0, 6.0)]
    forward = 2 + 3 + 10 + 10 + 5
    backward = 6 + 20 + 20 + 4 + 2
    assert micro_batch_s(stages, None) == forward + backward
    shown = forward + 6 + 20 + 20 + 4 + 4 + 2
    assert micro_batch_s(stages, None, hides_reductions=False) == shown


def test_a_slow_gather_holds_the_next_block() -> None:
    """The second block's parameters come 8 s after its turn."""
    first, second = Stage(2.0, 0.0), Stage(1.0, 0.0, gather=Transfer(10.0))
    assert micro_batch_s([first, second], None) == 10 + 1


def test_the_busiest_rank_decides_and_recomputed_experts_travel_again() -> None:
    stages = [Stage(3.0, 5.0, has_experts=True), Stage(1.0, 1.0)]
    experts = experts_of(4.0, 9.0)
    once = micro_batch_s(stages, experts)
    assert once == (3 + 4 + 1) + (1 + 9 + 5)
    assert micro_batch_s(stages, experts, recomputes_experts=True) == once + 4


def test_collectives_share_their_link_with_the_exchange() -> None:
    """9 s of the next block's parameters, and 6 s of rows beside 10 s of experts."""
    stages = [Stage(has_experts=True), Stage(gather=transfer(9.0))]
    assert micro_batch_s(stages, experts_of(10.0, 0.0, sent_s=6.0)) == 9 + 6
    # Between nodes the rows are on another link.
    elsewhere = Transfer(9.0, remote_s=9.0)
    stages = [Stage(has_experts=True), Stage(gather=elsewhere)]
    assert micro_batch_s(stages, experts_of(10.0, 0.0, sent_s=6.0)) == 10


@given(
    busiest=st.floats(0.1, 5.0),
    layers=st.integers(1, 4),
    dense=st.floats(0.0, 4.0),
    gather=st.floats(0.0, 6.0),
)
@settings(max_examples=40, deadline=None)
def test_bounds(busiest: float, layers: int, dense: float, gather: float) -> None:
    """At least what the busiest rank computes, at most everything in a row."""
    collective = transfer(gather)
    stage = Stage(dense, 2 * dense, True, collective, collective, collective)
    found = micro_batch_s([stage] * layers, experts_of(busiest, 2 * busiest))
    computed = 3 * layers * (dense + busiest)
    assert computed - 1e-9 <= found <= computed + 3 * gather * layers + 1e-9
    if not gather:
        assert found == pytest.approx(computed)
