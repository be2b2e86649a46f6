"""The closed form of an exchange: by hand for tiny cases, its properties, and measured ways."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.moe.schedule import ORDERS, Schedule
from distmoe.planner.collective_time import Transfer
from distmoe.planner.cost_model import (
    LEVELS,
    Prediction,
    best_schedule,
    predict,
)
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Link, Profile
from distmoe.planner.pass_steps import ModelStep, Parcel, steps_of
from distmoe.planner.pass_time import PassTime
from distmoe.planner.row_volumes import RankLayout, RowVolumes

BY_RANK = Schedule("rank", "source", 1)
# One value a row, one second a pair.
UNIT = LayerShape(20, hidden=1, intermediate=1, num_experts=2, top_k=1, tile=1, dtype="fp32")
HAND = Profile({"own": Link(0.25, 40.0), "node": Link(2.0, 8.0)}, {"fp32": 6.0}, 0.5)


def test_two_ranks_by_hand() -> None:
    """10 own rows and pairs, 10 of the peer. Copies: 1/4 s + rows / 10. A transfer: 1/2 s to
    launch, 2 s for the message, rows / 2."""
    found = predict(UNIT, RankLayout(2, 2), HAND, BY_RANK)
    way = 0.5 + 2 + 5
    gather, place, total = 0.25 + 1, 0.25 + 1, 0.25 + 2
    half, peers, wgrad = 0.5 + 5, 0.5 + 10, 0.5 + 20
    busy = gather + place + half + peers + half + total
    assert found.forward.serial_s == busy + 2 * way
    # The rows are here before the first half is done; they go home after the second.
    assert gather + way < gather + place + half + 1
    arrived = max(gather + way, gather + place + half)
    assert found.forward.overlapped_s == arrived + peers + half + way + total
    assert found.forward.busy_s == busy
    assert found.forward.exposed_share == 1 - busy / found.forward.overlapped_s
    assert found.forward.sent == Transfer(2 * way, node_s=2 * way)
    assert found.backward.serial_s == busy + wgrad + 2 * way
    # Weight gradients hide the way home.
    assert found.backward.overlapped_s == arrived + peers + half + wgrad + total


@pytest.mark.parametrize(
    ("steps", "rate", "expected"),
    [
        # Computing decides: a half that hides the first way, all blocks, a half, the last way.
        (2, 8.0, 5 + 10 + 5 + 2.5),
        # Sending decides: all ways there, the last block, both ways home.
        (2, 0.4, 100 + 5 + 100),
        # In more steps the links never rest: all ways there and home.
        (4, 0.4, 200.0),
    ],
)
def test_the_longest_of_three_chains(steps: int, rate: float, expected: float) -> None:
    """Nothing but pairs, 1 s, and rows, 4 / rate: 10 of each here and there."""
    profile = Profile({"own": Link(0, inf), "node": Link(0, rate)}, {"fp32": 6.0}, 0.0)
    schedule = Schedule("rank", "tokens", steps)
    found = predict(UNIT, RankLayout(2, 2), profile, schedule).forward
    assert found.overlapped_s == pytest.approx(expected)


def test_the_first_rows_may_come_after_the_own_half() -> None:
    """Eight ranks, 10 pairs of each, 60 s for the 70 rows of the others, in two steps."""
    profile = Profile({"own": Link(0, inf), "node": Link(0, 280 / 60)}, {"fp32": 6.0}, 0.0)
    shape = replace(UNIT, num_tokens=80, num_experts=8)
    found = predict(shape, RankLayout(8, 8), profile, Schedule("rank", "tokens", 2)).forward
    assert found.overlapped_s == pytest.approx(30 + 70 + 30 + 30)


@pytest.mark.parametrize(("shared", "rail"), [(False, 10.0), (True, 20.0)])
def test_rows_of_another_node_come_by_a_rank_of_this_one(shared: bool, rail: float) -> None:
    """2 x 2 ranks, no time but on links: 1 row/s between nodes, 2 rows/s in the node. Each rank has
    5 rows, so the rail has 10, of which 5 go on; the neighbour's need nobody."""
    profile = Profile(
        {"own": Link(0, inf), "node": Link(0, 8.0), "remote": Link(0, 4.0, shared)},
        {"fp32": inf},
        0.0,
    )
    shape, layout = replace(UNIT, num_experts=4), RankLayout(4, 2)
    found = predict(shape, layout, profile, Schedule("node", "tokens", 1)).forward
    near = relay = 2.5
    one_way = Transfer(rail + relay + near, node_s=relay + near, remote_s=rail)
    assert found.sent == one_way + one_way
    # The neighbour's rows come and go while the others are on the rail.
    assert found.overlapped_s == 2 * (rail + relay)
    assert found.serial_s == 2 * (rail + relay + near)


def test_links_inside_a_node_rest_while_relayed_rows_are_computed() -> None:
    """As before, but 100 s for a row inside the node and 1 s for a pair: the neighbour's 5 rows are
    home when the other node's 5 come; their 10 pairs, then they go home."""
    profile = Profile(
        {"own": Link(0, inf), "node": Link(0, 0.04), "remote": Link(0, 4.0)}, {"fp32": 6.0}, 0.0
    )
    shape, layout = replace(UNIT, num_experts=4), RankLayout(4, 2)
    found = predict(shape, layout, profile, Schedule("node", "tokens", 1)).forward
    assert found.overlapped_s == pytest.approx(2 * 1000 + 10)


def test_shorter_rows_take_less_time_on_links_and_some_to_pack() -> None:
    """Rows of 512 bytes as 144 there and 256 home: 10 at 8 bytes/s. To pack 20 rows takes as long
    as to copy them, and to unpack the 10 that arrive; nothing else takes any time."""
    shape = replace(UNIT, hidden=128, row_dtype="fp8", sum_dtype="bf16")
    profile = Profile({"own": Link(0, 5120.0), "node": Link(0, 8.0)}, {"fp32": inf}, 0.0)
    found = predict(shape, RankLayout(2, 2), profile, BY_RANK).forward
    assert found.sent == Transfer(180.0 + 320.0, node_s=180.0 + 320.0)
    packed, gathered, unpacked, summed = 2, 1, 1, 2
    assert found.overlapped_s == packed + gathered + 180 + unpacked + 320 + summed
    placed = 1
    assert found.busy_s == packed + gathered + placed + unpacked + summed


def test_one_rank_sends_nothing() -> None:
    profile = Profile({"own": Link(1.0, 1.0)}, {"fp32": 6.0}, 0.5)
    (found,) = best_schedule(UNIT, RankLayout(1, 1), profile)
    assert found.schedule == BY_RANK
    assert found.forward == PassTime(20.5, 20.5, 20.5, Transfer())
    assert found.backward.overlapped_s == 20.5 + 20.5


def test_steps_near_ranks_first() -> None:
    """2 nodes of 4, seven peers of 2 pairs and 1 row each; 3 rows for the other node."""
    layout, volumes = RankLayout(8, 4), RowVolumes(pairs=2.0, rows=1.0, node_rows=3.0)
    by_source = steps_of(layout, volumes, Schedule("rank", "source", 2))
    assert by_source == [
        ModelStep(8.0, Parcel(3, 3.0), Parcel(1, 1.0)),
        ModelStep(6.0, Parcel(), Parcel(3, 3.0)),
    ]
    assert [step.sent_rows for step in by_source] == [4, 3]
    copies = steps_of(layout, volumes, Schedule("copies", "tokens", 2))
    assert copies == [ModelStep(7.0, Parcel(3, 3.0), Parcel(4, 4.0))] * 2
    *near, first, second = steps_of(layout, volumes, Schedule("node", "tokens", 2))
    assert near == [ModelStep(2.0, Parcel(1, 1.0), Parcel())] * 3
    assert first == second == ModelStep(4.0, Parcel(3, 1.5), Parcel(1, 1.5), relayed=True)
    assert first.sent_rows == 1.5


shapes = st.builds(
    LayerShape,
    num_tokens=st.integers(1, 8192),
    hidden=st.sampled_from([64, 1024, 7168]),
    intermediate=st.sampled_from([64, 1536]),
    num_experts=st.sampled_from([16, 64, 256]),
    top_k=st.integers(1, 8),
    tile=st.sampled_from([1, 16, 128]),
    dtype=st.just("bf16"),
)
layouts = st.sampled_from([(2, 2), (4, 4), (4, 1), (4, 2), (8, 4), (16, 4), (16, 8)]).map(
    lambda sizes: RankLayout(*sizes)
)
links = st.builds(Link, st.sampled_from([0.0, 1e-6, 1e-3]), st.floats(1e6, 1e12), st.booleans())
profiles = st.builds(
    lambda own, node, remote, flops, host: Profile(
        {"own": own, "node": node, "remote": remote}, {"bf16": flops}, host
    ),
    links,
    links,
    links,
    st.floats(1e9, 1e15),
    st.sampled_from([0.0, 1e-5]),
)
schedules = st.builds(
    Schedule, st.sampled_from(LEVELS), st.sampled_from(ORDERS), st.integers(1, 16)
)


def passes(prediction: Prediction) -> list[PassTime]:
    return [prediction.forward, prediction.backward]


@settings(deadline=None)
@given(shapes, layouts, profiles, schedules)
def test_overlap_is_between_the_longest_part_and_the_sum(
    shape: LayerShape, layout: RankLayout, profile: Profile, schedule: Schedule
) -> None:
    for one in passes(predict(shape, layout, profile, schedule)):
        longest = max(one.busy_s, one.sent.node_s, one.sent.remote_s)
        assert (1 - 1e-9) * longest <= one.overlapped_s <= (1 + 1e-9) * one.serial_s
        assert 0 <= one.exposed_share <= 1


@settings(deadline=None)
@given(shapes, layouts, profiles, schedules, st.sampled_from(["own", "node", "remote"]))
def test_a_faster_link_is_never_slower(
    shape: LayerShape, layout: RankLayout, profile: Profile, schedule: Schedule, name: str
) -> None:
    link = profile.links[name]
    faster_link = replace(link, bytes_per_s=2 * link.bytes_per_s)
    faster = replace(profile, links={**profile.links, name: faster_link})
    before, after = (passes(predict(shape, layout, p, schedule)) for p in (profile, faster))
    for old, new in zip(before, after, strict=True):
        assert new.serial_s <= (1 + 1e-9) * old.serial_s
        assert new.overlapped_s <= (1 + 1e-9) * old.overlapped_s
