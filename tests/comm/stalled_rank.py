"""One of two gloo processes that exchange rows; rank 1 stops itself until somebody wakes it."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist

from distmoe.comm import make_exchange
from distmoe.comm.heartbeat import Heartbeats
from distmoe.comm.watchdog import Watchdog

WARNING_S = 1.0


def main(rank: int, port: int, name: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    exchange = make_exchange(dist.group.WORLD, name)
    hearts = Heartbeats.open(store, rank=rank, world=2, beat_s=WARNING_S / 4)
    exchange.observer.layer = "layer 5"
    exchange.observer.watchdog = Watchdog.open(rank, warning_s=WARNING_S, heartbeats=hearts)
    dist.barrier()
    received = torch.empty(3)
    transfer = exchange.post_recv("rows", {1 - rank: received})
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    exchange.post_send(transfer, {1 - rank: torch.full((3,), float(rank))})
    exchange.wait_recv(transfer)
    exchange.wait_send(transfer)
    assert received.tolist() == [1.0 - rank] * 3
    exchange.observer.watchdog.close()
    hearts.close()
    print("done", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
