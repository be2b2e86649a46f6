"""Links of known speed: an exchange between threads whose clocks go on by what the bytes take."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.comm import Transfer
from distmoe.comm.threaded import ThreadedExchange
from distmoe.planner import measure_links
from distmoe.planner.machine_profile import Link
from distmoe.planner.measure_links import LinkFigures

NODE, REMOTE, SLOW_PAIR = 20e6, 5e6, 2e6
LATENCY_S = 1e-3


class RankClock(threading.local):
    """Of the thread that is a rank: only what the links take, whatever else the machine does."""

    now = 0.0

    def read(self) -> float:
        # Nothing takes no time at all.
        self.now += 1e-7
        return self.now


clock = RankClock()


class TimedExchange(ThreadedExchange):
    """2 x 2 ranks; rows from rank 1 to rank 3 are the slowest."""

    def rate(self, source: int) -> float:
        if (source, self.rank) == (1, 3):
            return SLOW_PAIR
        return NODE if source // 2 == self.rank // 2 else REMOTE

    def wait_recv(self, transfer: Transfer) -> None:
        sizes = {source: buffer.numel() for source, buffer in transfer.recv.items()}
        super().wait_recv(transfer)
        for source, size in sizes.items():
            clock.now = clock.read() + LATENCY_S + size / self.rate(source)


def test_classes_pairs_and_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_links, "SIZES", (1 << 10, 1 << 18))
    monkeypatch.setattr(measure_links, "BUDGET_S", 0.02)
    monkeypatch.setattr(time, "perf_counter", clock.read)

    def measured(rank: int) -> list[LinkFigures]:
        exchange = TimedExchange(dist.group.WORLD)
        return measure_links.measure_links(exchange, ranks_per_node=2, device=torch.device("cpu"))

    figures = run_ranks(measured, 4)
    for of_rank in figures:
        node, remote = of_rank
        assert (node.name, remote.name) == ("node", "remote")
        assert node.fit.bytes_per_s == pytest.approx(NODE, rel=0.2)
        assert remote.fit.bytes_per_s == pytest.approx(REMOTE, rel=0.2)
        assert remote.worst[:2] == (1, 3)
        assert remote.worst[2] == pytest.approx(SLOW_PAIR, rel=0.2)
        assert node.fit.latency_s > LATENCY_S / 2
        assert [size for size, _ in node.curve] == [1 << 10, 1 << 18]
        assert node.fit == figures[0][0].fit


@pytest.mark.parametrize(
    ("name", "per_node", "alone", "expected"),
    [
        ("remote", 4, 4e8, Link(1e-4, 4e8, shared=True)),
        ("remote", 4, 1.1e8, Link(1e-4, 1e8)),
        ("remote", 1, 4e8, Link(1e-4, 1e8)),
        ("node", 4, 4e8, Link(1e-4, 1e8)),
    ],
)
def test_a_link_that_is_faster_alone_is_shared(
    name: str, per_node: int, alone: float, expected: Link
) -> None:
    figures = LinkFigures(name, Link(1e-4, 1e8), Link(1e-4, alone), (0, 1, 1e8), [])
    assert figures.link(per_node) == expected
