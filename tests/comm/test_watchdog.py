"""Who is missing when a wait does not end: ranks as threads, one of which stays away."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from slurm_cluster import wait_until
from torch._C._distributed_c10d import HashStore
from warm_python import start_python

from distmoe.comm import Exchange, make_exchange
from distmoe.comm.heartbeat import Heartbeats
from distmoe.comm.watchdog import Watchdog
from distmoe.launch.ports import free_port

WARNING_S = 0.3


@contextmanager
def watched(
    rank: int, exchange: Exchange, heartbeats: Heartbeats | None = None
) -> Iterator[list[str]]:
    """The lines that the watchdog of ``rank`` reports."""
    lines: list[str] = []
    watchdog = Watchdog.open(rank, warning_s=WARNING_S, heartbeats=heartbeats, report=lines.append)
    exchange.observer.watchdog, exchange.observer.layer = watchdog, "layer 3"
    try:
        yield lines
    finally:
        watchdog.close()


def swap(exchange: Exchange, before_send: Callable[[], object] = lambda: None) -> None:
    peers = [peer for peer in range(exchange.size) if peer != exchange.rank]
    transfer = exchange.post_recv("rows", {peer: torch.empty(2) for peer in peers})
    before_send()
    exchange.post_send(transfer, {peer: torch.zeros(2) for peer in peers})
    exchange.wait_recv(transfer)
    exchange.wait_send(transfer)


def test_ranks_whose_rows_are_missing_are_named_once() -> None:
    def run(rank: int) -> list[str]:
        exchange = make_exchange(dist.group.WORLD)
        late = rank in (1, 3)
        with watched(rank, exchange) as lines:
            swap(exchange, (lambda: time.sleep(4 * WARNING_S)) if late else lambda: None)
            swap(exchange)
        return lines

    reports = run_ranks(run, 4)
    for rank in (0, 2):
        (line,) = reports[rank]
        words = r"has waited \d s in layer 3, forward, for 'rows' from ranks 1, 3"
        assert re.match(f"rank {rank} {words}", line), line


def test_no_line_where_nobody_is_late() -> None:
    def run(rank: int) -> list[str]:
        exchange = make_exchange(dist.group.WORLD)
        with watched(rank, exchange) as lines:
            for _ in range(3):
                swap(exchange, lambda: time.sleep(WARNING_S / 3))
        return lines

    assert run_ranks(run, 3) == [[], [], []]


def test_slowest_so_far_is_of_all_waits() -> None:
    def run(rank: int) -> list[str]:
        exchange = make_exchange(dist.group.WORLD)
        with watched(rank, exchange) as lines:
            swap(exchange, lambda: time.sleep(0.2 if rank == 2 else 0))
            swap(exchange, lambda: time.sleep(4 * WARNING_S if rank == 1 else 0))
        return lines

    (line,) = run_ranks(run, 3)[0]
    assert "from rank 1; slowest so far: rank 2, 0." in line


def test_the_hard_end_is_an_error_in_the_same_words() -> None:
    def run(rank: int) -> tuple[list[str], str]:
        exchange = make_exchange(dist.group.WORLD)
        exchange.observer.timeout_s = 3 * WARNING_S
        with watched(rank, exchange) as lines:
            if rank == 1:
                return lines, ""
            with pytest.raises(TimeoutError) as caught:
                swap(exchange)
        return lines, str(caught.value)

    (line,), error = run_ranks(run, 2)[0]
    assert error.partition(" s in ")[2] == line.partition(" s in ")[2] != ""
    assert "in layer 3, forward, for 'rows' from rank 1" in error


def test_without_a_watchdog_the_error_still_names_the_rank() -> None:
    def run(rank: int) -> None:
        exchange = make_exchange(dist.group.WORLD)
        exchange.observer.timeout_s = 0.2
        if rank == 0:
            with pytest.raises(TimeoutError, match="for 'rows' from rank 1$"):
                swap(exchange)

    run_ranks(run, 2)


def test_a_wait_in_the_backward_says_so() -> None:
    class Swap(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, exchange):  # type: ignore[no-untyped-def]
            ctx.exchange = exchange
            return x.clone()

        @staticmethod
        def backward(ctx, dy):  # type: ignore[no-untyped-def]
            swap(ctx.exchange, lambda: time.sleep(4 * WARNING_S * ctx.exchange.rank))
            return dy, None

    def run(rank: int) -> list[str]:
        exchange = make_exchange(dist.group.WORLD)
        with watched(rank, exchange) as lines:
            Swap.apply(torch.ones(1, requires_grad=True), exchange).sum().backward()
        return lines

    (line,) = run_ranks(run, 2)[0]
    assert "in layer 3, backward, for 'rows' from rank 1" in line


@pytest.mark.parametrize("alive", [True, False])
def test_a_collective_names_the_rank_by_its_heartbeat(alive: bool) -> None:
    """A rank that lives and has not come, and one without a sign of life."""
    store = HashStore()
    done = threading.Event()

    def run(rank: int) -> list[str]:
        exchange = make_exchange(dist.group.WORLD)
        hearts = Heartbeats.open(store, rank=rank, world=3, beat_s=0.05)
        with watched(rank, exchange, hearts) as lines:
            if rank == 1:
                if not alive:
                    hearts.close()
                time.sleep(4 * WARNING_S)
            exchange.all_gather(torch.zeros(1), kind="counts")
            done.wait(0.1)
        hearts.close()
        return lines

    reports = run_ranks(run, 3)
    word = "still behind: rank 1" if alive else "no sign of life from rank 1"
    for rank in (0, 2):
        assert f"for all ranks in the collective 'counts' ({word})" in reports[rank][-1]


def test_a_rank_that_stands_still_elsewhere() -> None:
    """Rank 0 is in no exchange; rank 1 is behind. Work of its own alone is no reason to speak."""
    store = HashStore()

    def run(rank: int) -> tuple[list[str], str]:
        exchange = make_exchange(dist.group.WORLD)
        hearts = Heartbeats.open(store, rank=rank, world=2, beat_s=0.05)
        with watched(rank, exchange, hearts) as lines:
            swap(exchange)
            time.sleep(4 * WARNING_S)
            assert lines == []
            if rank == 0:
                exchange.observer.begun("pairs")
            time.sleep(4 * WARNING_S)
            still = exchange.observer.watchdog.stand_still(WARNING_S)
            swap(exchange)
            assert exchange.observer.watchdog.stand_still(0) == ""
        hearts.close()
        return lines, still

    (lines, still), (other_lines, other_still) = run_ranks(run, 2)
    (line,) = lines
    assert line.startswith("rank 0 has begun no transfer for ")
    assert "the last was 'pairs' in layer 3; still behind: rank 1" in line
    assert still.partition(" s, ")[2] == line.partition(" s, ")[2]
    # The rank that is waited for says where it is.
    (other,) = other_lines
    assert other.startswith("rank 1 keeps other ranks waiting: it has begun no transfer for ")
    assert "the last was 'rows' in layer 3; it is at\n" in other
    assert other.endswith("time.sleep(4 * WARNING_S)")
    assert other_still == ""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("p2p", "for 'rows' from rank 1"),
        ("all_to_all", "for all ranks in the collective 'rows' (no sign of life from rank 1)"),
    ],
)
def test_a_stopped_process_is_named_and_the_run_goes_on(name: str, words: str) -> None:
    port = free_port()
    program = str(Path(__file__).with_name("stalled_rank.py"))
    first, second = (start_python(program, str(rank), str(port), name) for rank in range(2))
    try:
        wait_until(lambda: "rank 0" in first.said())
        assert re.search(rf"^rank 0 .* in layer 5, forward, {re.escape(words)}", first.said())
        assert first.poll() is None
        second.send_signal(signal.SIGCONT)
        for rank in (first, second):
            assert rank.wait(timeout=60) == 0
            assert "done" in rank.said()
    finally:
        first.kill()
        second.kill()


def test_a_store_that_does_not_answer() -> None:
    class Deaf:
        def clone(self) -> Deaf:
            return self

        def set(self, key: str, value: str) -> None:
            pass

        def multi_get(self, keys: list[str]) -> list[bytes]:
            raise RuntimeError("timeout")

    hearts = Heartbeats.open(Deaf(), rank=1, world=2, beat_s=0.01)  # type: ignore[arg-type]
    assert hearts.look().laggards == "the store that holds the ranks' heartbeats does not answer"
    hearts.close()


def test_threads_begin_with_open_and_end_with_close() -> None:
    def alive(watchdog: Watchdog, hearts: Heartbeats) -> list[bool]:
        return [watchdog._thread.is_alive(), hearts._thread.is_alive()]

    store = HashStore()
    made = Heartbeats(store, store, rank=0, world=1, beat_s=60)
    assert alive(Watchdog(0, warning_s=60, heartbeats=made), made) == [False, False]
    hearts = Heartbeats.open(store, rank=0, world=1, beat_s=60)
    watchdog = Watchdog.open(0, warning_s=60, heartbeats=hearts)
    assert alive(watchdog, hearts) == [True, True]
    watchdog.close()
    hearts.close()
    assert alive(watchdog, hearts) == [False, False]
