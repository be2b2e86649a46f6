"""Bytes by distance and of collectives, waits by peer."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.comm import make_exchange


def to_everyone(rank: int, ranks_per_node: int) -> dict[tuple[str, str], int]:
    """Rank r sends r + 1 floats to every other rank, and 4 bytes in a gather."""
    exchange = make_exchange(dist.group.WORLD, ranks_per_node=ranks_per_node)
    peers = [peer for peer in range(exchange.size) if peer != rank]
    transfer = exchange.post_recv("rows", {peer: torch.empty(peer + 1) for peer in peers})
    exchange.post_send(transfer, {peer: torch.zeros(rank + 1) for peer in peers})
    exchange.wait_recv(transfer)
    exchange.wait_send(transfer)
    exchange.all_gather(torch.zeros(1, dtype=torch.int32), kind="counts")
    return dict(exchange.traffic.bytes_by_distance)


@pytest.mark.parametrize("ranks_per_node", [0, 5, 8])
def test_one_node(ranks_per_node: int) -> None:
    for rank, sent in enumerate(run_ranks(to_everyone, 5, ranks_per_node)):
        assert sent == {("rows", "node"): 4 * 4 * (rank + 1), ("counts", "node"): 16}


def test_nodes_of_two_and_a_last_one_of_one() -> None:
    for rank, sent in enumerate(run_ranks(to_everyone, 5, 2)):
        near = 0 if rank == 4 else 1
        expected = {
            ("rows", "node"): 4 * (rank + 1) * near,
            ("rows", "remote"): 4 * (rank + 1) * (4 - near),
            ("counts", "node"): 4 * near,
            ("counts", "remote"): 4 * (4 - near),
        }
        assert sent == {key: count for key, count in expected.items() if count}


def test_a_sum_counts_a_reduce_scatter_and_an_all_gather() -> None:
    """Of 7 numbers over 3 ranks: parts of 3, 2 and 2. A peer is sent its addends, and the own sums;
    over all ranks 2 (P - 1) times the whole."""

    def run(rank: int) -> int:
        exchange = make_exchange(dist.group.WORLD)
        exchange.all_reduce(torch.zeros(7, dtype=torch.int32), kind="sums")
        assert exchange.traffic.rounds == {"sums": 1}
        return exchange.traffic.bytes_sent["sums"]

    assert run_ranks(run, 3) == [4 * (4 + 2 * 3), 4 * (5 + 2 * 2), 4 * (5 + 2 * 2)]


def test_seconds_of_waits_are_always_counted() -> None:
    def late(rank: int) -> float:
        exchange = make_exchange(dist.group.WORLD)
        transfer = exchange.post_recv("rows", {1 - rank: torch.empty(1)})
        if rank == 1:
            time.sleep(0.3)
        exchange.post_send(transfer, {1 - rank: torch.empty(1)})
        exchange.wait_recv(transfer)
        return exchange.observer.wait_seconds

    waited, late_itself = run_ranks(late, 2)
    assert 0.2 < waited
    assert late_itself < 0.2
