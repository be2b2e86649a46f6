"""The simulated rank: by hand for tiny cases, against the design's table, and its properties."""

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distmoe.moe.carry import carry_tiles
from distmoe.planner.cost_model import (
    LEVELS,
    ORDERS,
    Prediction,
    Schedule,
    best_schedule,
    predict,
)
from distmoe.planner.layer_shape import LayerShape
from distmoe.planner.machine_profile import Link, Profile
from distmoe.planner.pass_simulation import PassTime
from distmoe.planner.pass_steps import carried
from distmoe.planner.row_volumes import RankLayout, RowVolumes

BY_RANK = Schedule("rank", "source", 1)
# One value a row, one second a pair.
UNIT = LayerShape(1, hidden=1, intermediate=1, num_experts=2, top_k=1, tile=1, dtype="fp32")


def test_two_ranks_by_hand() -> None:
    """Own rows 4 with 6 pairs, the peer's 5 with 10. Copies: 1/4 s + rows / 10. Transfers: 1/2 s to
    launch, 2 s for the message, rows / 2."""
    profile = Profile({"own": Link(0.25, 40.0), "node": Link(2.0, 8.0)}, {"fp32": 6.0}, 0.5)
    volumes = RowVolumes(np.array([[6.0, 10.0]]), np.array([[4.0, 5.0]]), np.array([9.0]))
    found = predict(UNIT, RankLayout(2, 2), profile, BY_RANK, volumes=volumes)
    there = home = 0.5 + 2 + 2.5
    gather, place, total = 0.25 + 0.5, 0.25 + 0.4, 0.25 + 0.9
    half, peers, wgrad = 0.5 + 3, 0.5 + 10, 0.5 + 16
    serial = gather + there + place + half + peers + home + half
    arrived = gather + there
    assert arrived > gather + place + half
    overlapped = arrived + peers + max(home, half)
    hidden = arrived + peers + half + wgrad
    assert found.forward.serial_s == pytest.approx(serial + total)
    assert found.forward.overlapped_s == pytest.approx(overlapped + total)
    assert found.backward.serial_s == pytest.approx(serial + wgrad + total)
    assert found.backward.overlapped_s == pytest.approx(hidden + total)
    waits = (arrived - gather - place - half) + (home - half)
    assert found.forward.exposed_s == pytest.approx(waits)
    assert found.forward.exposed_share == pytest.approx(waits / (overlapped + total))
    assert found.forward.gemm_s == 16
    assert found.backward.gemm_s == 32
    assert found.forward.bytes_sent == {"node": 2 * 4 * 5}
    assert found.forward.link_s == {"node": there + home}


@pytest.mark.parametrize(("shared", "rail"), [(False, 3.0), (True, 6.0)])
def test_rows_of_another_node_come_by_a_rank_of_this_one(shared: bool, rail: float) -> None:
    """2 x 2 ranks, no time but on links: 1 row/s between nodes, 2 rows/s in the node. The rail's 3
    rows become 4; the 2 rows of the neighbour need nobody."""
    profile = Profile(
        {"own": Link(0, inf), "node": Link(0, 8.0), "remote": Link(0, 4.0, shared)},
        {"fp32": inf},
        0.0,
    )
    volumes = RowVolumes(np.ones((2, 2)), np.array([[1.0, 2.0], [1.0, 4.0]]), np.array([1.0, 3.0]))
    shape, layout = replace(UNIT, num_experts=4), RankLayout(4, 2)
    found = predict(shape, layout, profile, Schedule("node", "tokens", 1), volumes=volumes)
    far, near = rail + 2, 1
    # The neighbour's rows come and go while the others are on the rail.
    assert found.forward.overlapped_s == 2 * far
    assert found.forward.serial_s == 2 * far + 2 * near
    assert found.forward.bytes_sent == {"node": 2 * 4 * 6, "remote": 2 * 4 * 3}


def test_one_rank_sends_nothing() -> None:
    profile = Profile({"own": Link(1.0, 1.0)}, {"fp32": 6.0}, 0.5)
    shape = replace(UNIT, num_tokens=10)
    (found,) = best_schedule(shape, RankLayout(1, 1), profile)
    assert found.schedule == BY_RANK
    assert found.forward.overlapped_s == found.forward.serial_s == 0.5 + 10
    assert found.forward.exposed_s == 0
    assert found.forward.bytes_sent == {}


# From a coarser model, which the design was made with. Milliseconds at H 4096, I 1536, E 128, K 8,
# T 8192 a rank, bf16: one way by pairs, by ranks and by nodes; forward without overlap; and forward
# and backward at their best, with the waiting share.
TABLE = {
    2: (0.75, 0.19, None, 5.39, 5.13, 0.04, 9.95, 0.01),
    4: (1.12, 0.51, None, 6.03, 5.22, 0.05, 9.95, 0.01),
    8: (1.30, 0.87, None, 6.76, 5.29, 0.06, 9.97, 0.01),
    16: (6.32, 5.21, 1.57, 8.21, 5.41, 0.09, 10.07, 0.02),
    32: (9.47, 8.72, 4.30, 13.66, 8.88, 0.44, 10.45, 0.05),
    64: (11.05, 10.75, 7.38, 19.84, 14.97, 0.67, 14.97, 0.34),
    128: (11.84, 11.84, 9.77, 24.64, 19.79, 0.75, 19.79, 0.50),
}
# What that table assumes: NVLink 360 GB/s and 0.5 us a peer, a 400 Gbit NIC at 42.5 GB/s and 1.5 us
# a peer, 500 TFLOP/s, 20 us for an exchange and 25 for a block (here one number), free copies.
TABLE_PROFILE = Profile(
    {"own": Link(0, inf), "node": Link(0.5e-6, 360e9), "remote": Link(1.5e-6, 42.5e9)},
    {"bf16": 500e12},
    22.5e-6,
)
# It carries no tiles over, so a tile is one row.
TABLE_SHAPE = LayerShape(8192, 4096, 1536, 128, 8, tile=1)


def table_layout(ranks: int) -> RankLayout:
    return RankLayout(ranks, min(ranks, 8))


def best_of_table(ranks: int, *, own_first: float) -> tuple[PassTime, PassTime]:
    """The best forward and the best backward by tokens, of nodes where there are several."""
    level = "node" if ranks > 8 else "rank"
    found = [
        predict(
            TABLE_SHAPE,
            table_layout(ranks),
            TABLE_PROFILE,
            Schedule(level, "tokens", steps),
            own_first=own_first,
        )
        for steps in range(1, 17)
    ]
    forward = min((p.forward for p in found), key=lambda one: one.overlapped_s)
    backward = min((p.backward for p in found), key=lambda one: one.overlapped_s)
    return forward, backward


def without_gemm(one: PassTime) -> float:
    """The table counts launches as waiting."""
    return 1 - one.gemm_s / one.overlapped_s


@pytest.mark.parametrize("ranks", TABLE)
def test_table_one_way(ranks: int) -> None:
    copies, by_rank, by_node = TABLE[ranks][:3]
    for level, in_table in (("copies", copies), ("rank", by_rank), ("node", by_node)):
        if in_table is None:
            continue
        found = predict(
            TABLE_SHAPE, table_layout(ranks), TABLE_PROFILE, Schedule(level, "tokens", 1)
        ).forward
        # The slower link; for one way, without latencies.
        sent = {
            link: 0.5 * size / TABLE_PROFILE.links[link].bytes_per_s
            for link, size in found.bytes_sent.items()
        }
        assert 1e3 * max(sent.values()) == pytest.approx(in_table, rel=0.01, abs=0.006)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_table_inside_a_node(ranks: int) -> None:
    _, _, _, serial, forward, share, backward, backward_share = TABLE[ranks]
    layout = table_layout(ranks)
    plain = predict(TABLE_SHAPE, layout, TABLE_PROFILE, BY_RANK, own_first=1.0)
    assert 1e3 * plain.forward.serial_s == pytest.approx(serial, rel=0.015)
    best_forward, best_backward = best_of_table(ranks, own_first=1.0)
    assert 1e3 * best_forward.overlapped_s == pytest.approx(forward, rel=0.015)
    assert without_gemm(best_forward) == pytest.approx(share, abs=0.015)
    assert 1e3 * best_backward.overlapped_s == pytest.approx(backward, rel=0.015)
    assert without_gemm(best_backward) == pytest.approx(backward_share, abs=0.01)


@pytest.mark.parametrize("ranks", [16, 32, 64, 128])
def test_table_of_several_nodes(ranks: int) -> None:
    """The table lets both hops of a row run at the same time from the first row on, and sends rows
    of all nodes in each step; here the second hop follows the first, node by node."""
    _, _, _, _, forward, share, backward, _ = TABLE[ranks]
    best_forward, best_backward = best_of_table(ranks, own_first=1.0)
    assert 1e3 * best_forward.overlapped_s == pytest.approx(forward, rel=0.04)
    assert without_gemm(best_forward) == pytest.approx(share, abs=0.035)
    assert 1e3 * best_backward.overlapped_s == pytest.approx(backward, rel=0.03)


@pytest.mark.parametrize(
    ("ranks", "first", "halves"), [(2, 0.036, 0.015), (4, 0.052, 0.015), (8, 0.065, 0.025)]
)
def test_halves_of_the_own_rows_at_both_ends_hide_more(
    ranks: int, first: float, halves: float
) -> None:
    """The design's waiting shares with all own rows first, and with half of them last."""
    for own_first, in_table in ((1.0, first), (0.5, halves)):
        best, _ = best_of_table(ranks, own_first=own_first)
        assert without_gemm(best) == pytest.approx(in_table, abs=0.005)


def test_carried_tiles_delay_the_last_rows() -> None:
    """With tiles of 128 the last peer's rows are finished by the second half of the own rows, which
    then no longer hides their way home: at 8 ranks 6 % wait instead of 3 %."""
    shares = [
        without_gemm(
            predict(
                replace(TABLE_SHAPE, tile=tile),
                table_layout(8),
                TABLE_PROFILE,
                Schedule("rank", "source", 5),
            ).forward
        )
        for tile in (1, 128)
    ]
    assert shares[0] < 0.035
    assert 0.05 < shares[1] < 0.07


def test_carried_pairs_are_the_mean_of_random_counts() -> None:
    generator = np.random.default_rng(0)
    tile, experts, blocks = 16, 400, 5
    counts_be = generator.poisson(40.0, (blocks, experts))
    bounds_b2e, _ = carry_tiles(counts_be, tile)
    done_b = (bounds_b2e[:-1, 1] - bounds_b2e[0, 0]).mean(1)
    arrived_b = counts_be.cumsum(0)[:-1].mean(1)
    np.testing.assert_allclose(arrived_b - carried(arrived_b, tile), done_b, atol=0.75)


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
def test_what_waits_is_between_nothing_and_all_communication(
    shape: LayerShape, layout: RankLayout, profile: Profile, schedule: Schedule
) -> None:
    for one in passes(predict(shape, layout, profile, schedule)):
        assert 0 <= one.exposed_s <= (1 + 1e-9) * sum(one.link_s.values())
        assert one.overlapped_s >= (1 - 1e-9) * max(one.busy_s, *one.link_s.values())
        assert 0 <= one.exposed_share <= 1


@settings(deadline=None)
@given(shapes, layouts, profiles, schedules)
def test_overlap_is_never_slower(
    shape: LayerShape, layout: RankLayout, profile: Profile, schedule: Schedule
) -> None:
    for one in passes(predict(shape, layout, profile, schedule)):
        assert one.overlapped_s <= (1 + 1e-9) * one.serial_s


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
