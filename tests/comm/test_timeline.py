"""Intervals of a real layer over a slow transport, and their file."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from slow_mlp import SlowMlp
from torch import Tensor

from distmoe import MoE, MoEConfig
from distmoe.comm.exposure import exposures
from distmoe.comm.threaded import ThreadedExchange
from distmoe.comm.timeline import Interval, Timeline
from distmoe.comm.trace import RankClock, trace, write_trace
from distmoe.config import DispatchConfig, RoundingConfig

CPU = torch.device("cpu")
LATENCY_S = 0.05
COMPUTE_S = 0.03
CONFIG = MoEConfig(
    hidden_size=16,
    intermediate_size=8,
    num_experts=4,
    top_k=2,
    # Tiles of one row: a block's rows go home as soon as it has run.
    rounding=RoundingConfig("none", tile=1),
)


class SlowExchange(ThreadedExchange):
    """Rows arrive ``LATENCY_S`` after they were sent."""

    def _take(self, peer: int, buffer: Tensor, tag: int) -> None:
        super()._take(peer, buffer, tag)
        time.sleep(LATENCY_S)


def traced_layer(overlap: bool) -> list[list[Interval]]:
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0))
    config = replace(CONFIG, dispatch=DispatchConfig(overlap=overlap))

    def run(rank: int) -> list[Interval]:
        layer = MoE(config, dist.group.WORLD)
        layer.exchange = SlowExchange(dist.group.WORLD)
        layer._mlp = SlowMlp(layer.mlp, COMPUTE_S)
        observer = layer.exchange.observer
        observer.layer, observer.timeline = "layer 7", Timeline(CPU)
        out, _ = layer(x[rank].clone().requires_grad_())
        assert observer.timeline.stop() == []
        observer.timeline.start()
        for _ in range(2):
            out, _ = layer(x[rank].clone().requires_grad_())
            out.sum().backward()
        intervals = observer.timeline.stop()
        layer(x[rank])
        assert len(observer.timeline._noted) == len(intervals)
        return intervals

    return run_ranks(run, 2)


@pytest.fixture(scope="module")
def overlapped() -> list[list[Interval]]:
    return traced_layer(True)


def overlap_seconds(intervals: list[Interval]) -> float:
    """While something was computed and some rows were in flight."""
    compute = [i for i in intervals if i.note.what == "compute"]
    flights = [i for i in intervals if i.note.what == "receive" and i.note.name == "rows"]
    return sum(
        max(0.0, min(c.end, f.end) - max(c.begin, f.begin)) for c in compute for f in flights
    )


def test_every_interval_is_matched_and_has_a_layer(overlapped: list[list[Interval]]) -> None:
    for rank, intervals in enumerate(overlapped):
        assert all(i.end >= i.begin and i.note.where.layer == "layer 7" for i in intervals)
        kinds = {(i.note.what, i.note.name) for i in intervals}
        assert {("compute", name) for name in ("forward", "row_sum", "dgrad", "wgrad")} <= kinds
        assert {("receive", name) for name in ("pairs", "rows", "scores")} <= kinds
        assert ("exchange", "counts") in kinds
        received = [i.note for i in intervals if i.note.what == "receive"]
        waited = [i.note for i in intervals if i.note.what == "wait" and i.note.peer is not None]
        assert len(received) == len(waited)
        assert {note.peer for note in received} == {1 - rank}
        # Two steps: rows there and back in forward and backward.
        assert sum(note.name == "rows" for note in received) == 2 * 4
        assert {i.note.where[1:] for i in intervals} == {
            (backward, number) for backward in (False, True) for number in range(2)
        }
        forwards = [i.note for i in intervals if i.note.name == "forward"]
        assert [note.block for note in forwards] == [0, 1, 2] * 2


def test_computation_and_rows_overlap(overlapped: list[list[Interval]]) -> None:
    serial = traced_layer(False)
    for rank in range(2):
        assert overlap_seconds(overlapped[rank]) > 4 * COMPUTE_S
        assert overlap_seconds(serial[rank]) < COMPUTE_S
        exposed, exposed_serial = (
            sum(e.exposed for e in exposures(intervals))
            for intervals in (overlapped[rank], serial[rank])
        )
        assert exposed < exposed_serial - 4 * COMPUTE_S


def test_chrome_trace(overlapped: list[list[Interval]], tmp_path: Path) -> None:
    zero = min(i.begin for i in overlapped[1])
    path = tmp_path / "trace" / "rank.json"
    write_trace(path, overlapped[1], rank=1, clock=RankClock(zero, 0.002))
    # Strict: JSON has no NaN and no Infinity.
    written = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert [file.name for file in path.parent.iterdir()] == ["rank.json"]
    slices = [event for event in written["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == len(overlapped[1])
    rows: dict[int, list[tuple[float, float]]] = {}
    for event in slices:
        assert event["pid"] == 1
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["args"]["layer"] == "layer 7"
        assert ("bytes" in event["args"]) == (event["cat"] not in ("compute", "post"))
        rows.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    names = {
        event["tid"]: event["args"]["name"]
        for event in written["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert set(names) == set(rows)
    assert {"compute", "post", "wait", "receive from 0"} <= set(names.values())
    assert len(set(names.values())) == len(names)
    for spans in rows.values():
        for (_, end), (begin, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
            assert begin >= end - 1e-3
    assert written["otherData"]["clock_error_us"] == pytest.approx(2000)
    assert {e["backward"] for e in written["exposure"]} == {False, True}
    assert {peer for e in written["exposure"] for peer in e["waited_for"]} == {"0", "collectives"}


def test_no_intervals_are_an_empty_trace() -> None:
    empty = trace([], rank=0, clock=RankClock(0.0, 0.0))
    assert [event["ph"] for event in empty["traceEvents"]] == ["M"]
