"""Every transport moves the same rows: torch's on gloo processes, the threaded one on threads."""

from __future__ import annotations

from pathlib import Path

import exchange_contract
import pytest
import torch
import torch.distributed as dist
from exchange_contract import exercise
from ranks import run_ranks
from warm_python import start_python

from distmoe.comm import make_exchange
from distmoe.comm.local import LocalExchange


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
def test_threads(num_ranks: int) -> None:
    run_ranks(lambda rank: exercise(make_exchange(dist.group.WORLD)), num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 5])
def test_lists_of_buffers_as_for_nccl(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distmoe.comm.torch_all_to_all.row_backend", lambda group: "nccl")
    run_ranks(lambda rank: exercise(make_exchange(dist.group.WORLD, "all_to_all")), num_ranks)


def test_two_exchanges_over_one_group_keep_apart() -> None:
    def both(rank: int) -> None:
        first, second = (make_exchange(dist.group.WORLD, "threaded") for _ in range(2))
        peer = 1 - rank
        buffers = [torch.empty(1), torch.empty(1)]
        transfers = [
            e.post_recv("rows", {peer: b}) for e, b in zip((first, second), buffers, strict=True)
        ]
        second.post_send(transfers[1], {peer: torch.tensor([2.0])})
        first.post_send(transfers[0], {peer: torch.tensor([1.0])})
        first.wait_recv(transfers[0])
        second.wait_recv(transfers[1])
        assert [float(b) for b in buffers] == [1.0, 2.0]

    run_ranks(both, 2)


def test_one_rank_has_no_peers() -> None:
    exchange = LocalExchange()
    exercise(exchange)
    with pytest.raises(AssertionError, match="no peers"):
        exchange.post_recv("rows", {1: torch.empty(1)})


def exercised_ranks(world: int, folder: Path, backend: str) -> list[str]:
    """Those that came to their end; each reports by a file, since an interpreter that exits may
    still abort in a gloo thread."""
    processes = [
        start_python(exchange_contract.__file__, str(rank), str(world), str(folder), backend)
        for rank in range(world)
    ]
    for process in processes:
        process.wait(timeout=90)
    return sorted(path.name for path in folder.glob("ok-*"))


@pytest.mark.processes
def test_gloo_processes(tmp_path: Path) -> None:
    assert exercised_ranks(3, tmp_path, "gloo") == ["ok-0", "ok-1", "ok-2"]


@pytest.mark.gpu
@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_nccl_processes(tmp_path: Path) -> None:
    world = min(torch.cuda.device_count(), 8)
    assert exercised_ranks(world, tmp_path, "nccl") == [f"ok-{rank}" for rank in range(world)]
