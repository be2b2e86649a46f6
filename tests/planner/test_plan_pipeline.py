"""The pipeline of layers by hand: who waits for whom, and which rank decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.planner.collective_time import Transfer
from distmoe.planner.expert_time import ExpertTimes, PassTimes
from distmoe.planner.pipeline_simulation import PipelineTime, Stage, simulate

ROOT = Stage(gather=Transfer(2.0), reduce=Transfer(2.0))


def transfer(seconds: float) -> Transfer:
    return Transfer(seconds, node_s=seconds)


def passes(*layers: list[float], node_s: float = 0.0) -> PassTimes:
    """Without waits for messages."""
    seconds_LP = np.array(layers)
    return PassTimes(seconds_LP, seconds_LP, {"node": node_s})


def test_gathers_are_hidden_behind_the_block_before() -> None:
    """Forward: root 2, block 3 while nothing runs; then 10 and 5 s of computing. Backward: the last
    block is gathered first, the other behind it; reductions go on beside, the last ones do not."""
    block = Stage(10.0, 20.0, gather=Transfer(3.0), gather_again=Transfer(3.0), reduce=Transfer(4))
    head = Stage(5.0, 6.0)
    found = simulate([ROOT, block, block, head], None)
    forward = 2 + 3 + 10 + 10 + 5
    # The root's reduction follows that of the first block.
    backward = 6 + 20 + 20 + 4 + 2
    assert found.seconds == forward + backward
    alone = simulate([ROOT, block, block, head], None, hides_reductions=False)
    assert alone.seconds == forward + backward + 4


def test_a_slow_gather_holds_the_next_block() -> None:
    """The second block's parameters come 8 s after its turn."""
    first, second = Stage(2.0, 0.0), Stage(1.0, 0.0, gather=Transfer(10.0))
    assert simulate([first, second], None).seconds == 10 + 1


def test_the_busiest_rank_decides() -> None:
    """Two layers whose busiest ranks are others: nobody gains from being light in one."""
    experts = ExpertTimes(passes([1.0, 4.0], [5.0, 2.0]), passes([0.0, 0.0], [0.0, 0.0]))
    stages = [Stage(3.0, 0.0, expert_layer=0), Stage(3.0, 0.0, expert_layer=1)]
    found = simulate(stages, experts)
    # The backward's experts wait for rows as long as the forward's.
    assert found.seconds == (3 + 4 + 3 + 5) + (5 + 4)
    assert found.busy_s == 2.5 + 3.5
    assert found.exposed_s == 0
    assert found.straggler_s == (4 - 2.5) + (5 - 3.5) + (5 + 4)


def test_weight_gradients_are_nobody_elses_business() -> None:
    """The light rank has its rows back after 4 s, and goes on while the busy one ends its own."""
    experts = ExpertTimes(passes([4.0, 4.0]), passes([4.0, 9.0]))
    with_attention = [Stage(0.0, 2.0, expert_layer=0)]
    found = simulate(with_attention, experts)
    assert found.seconds == 4 + 9 + 2
    assert found.straggler_s == 0


def test_recomputed_experts_travel_again() -> None:
    experts = ExpertTimes(passes([4.0, 4.0]), passes([8.0, 8.0]))
    stages = [Stage(1.0, 2.0, expert_layer=0)]
    once = simulate(stages, experts).seconds
    assert once == 1 + 4 + 8 + 2
    assert simulate(stages, experts, recomputes_experts=True).seconds == once + 4


def test_collectives_wait_for_the_link_that_the_exchange_uses() -> None:
    """The gather of the next block shares the link with 6 s of rows; it was posted before them."""
    experts = ExpertTimes(passes([10.0], node_s=6.0), passes([0.0], node_s=0.0))
    first = Stage(0.0, 0.0, expert_layer=0, gather=transfer(1.0))
    second = Stage(0.0, 0.0, gather=transfer(9.0))
    third = Stage(0.0, 0.0, gather=transfer(9.0))
    # 1, then 9 s for the second's, behind which the rows go, then the third's.
    found = simulate([first, second, third], experts)
    # In the backward the exchange costs the pass of the forward, 10 s, once more.
    assert found.seconds == 1 + 9 + 6 + 9 + 10


@given(
    loads=st.lists(st.lists(st.floats(0.1, 5.0), min_size=3, max_size=3), min_size=1, max_size=4),
    dense=st.floats(0.0, 4.0),
    gather=st.floats(0.0, 6.0),
)
@settings(max_examples=40, deadline=None)
def test_bounds(loads: list[list[float]], dense: float, gather: float) -> None:
    """At least what the busiest ranks compute, at most everything in a row."""
    forward = passes(*loads)
    experts = ExpertTimes(forward, passes(*[[2 * x for x in layer] for layer in loads]))
    collective = transfer(gather)
    stages = [
        Stage(dense, 2 * dense, layer, collective, collective, collective)
        for layer in range(len(loads))
    ]
    found: PipelineTime = simulate(stages, experts)
    computed = 3 * dense * len(loads) + 3 * sum(map(max, loads))
    assert found.seconds >= computed - 1e-9
    assert found.seconds <= computed + 3 * gather * len(loads) + 1e-9
    if not gather:
        assert found.seconds == pytest.approx(computed)
    assert found.straggler_s >= -1e-9
