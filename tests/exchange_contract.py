"""What every transport must do. Run as a program it is one rank of three gloo processes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distmoe.comm import Exchange, make_exchange
from distmoe.comm.torch_p2p import PointToPointExchange


def rows_for(source: int, target: int) -> torch.Tensor:
    """Ragged: some pairs of ranks exchange nothing."""
    count = (source + 2 * target) % 4
    return torch.arange(count * 3.0).view(count, 3) + 100 * source + 10 * target


def exercise(exchange: Exchange) -> None:
    """Two transfers in flight at once, of different sizes and kinds, a gather and a sum."""
    rank, peers = exchange.rank, [p for p in range(exchange.size) if p != exchange.rank]
    flights = []
    for scale in (1.0, -1.0):
        recv = {p: torch.full_like(rows_for(p, rank), float("nan")) for p in peers}
        recv = {p: buffer for p, buffer in recv.items() if buffer.numel()}
        flights.append((scale, exchange.post_recv("rows", recv), recv))
    for scale, transfer, _ in flights:
        send = {p: scale * rows_for(rank, p) for p in peers if rows_for(rank, p).numel()}
        exchange.post_send(transfer, send)
    for scale, transfer, recv in flights:
        exchange.wait_recv(transfer)
        for p, buffer in recv.items():
            assert torch.equal(buffer, scale * rows_for(p, rank))
    for _, transfer, _ in flights:
        exchange.wait_send(transfer)
    sent = 2 * 4 * sum(rows_for(rank, p).numel() for p in peers)
    assert exchange.traffic.bytes_sent.get("rows", 0) == sent
    gathered = exchange.all_gather(torch.tensor([rank, 7], dtype=torch.int32), kind="counts")
    assert gathered.tolist() == [[p, 7] for p in range(exchange.size)]
    own = torch.tensor([[rank, 7], [2, 3]], dtype=torch.int32)
    size = exchange.size
    want = torch.tensor([[size * (size - 1) // 2, 7 * size], [2 * size, 3 * size]])
    assert torch.equal(exchange.all_reduce(own, kind="sums").long(), want)
    assert torch.equal(exchange.all_reduce(own.T, kind="sums").long(), want.T)
    # What is sent is as it was.
    assert own.tolist() == [[rank, 7], [2, 3]]


def gloo_rank(rank: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), 3)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    for name in ("p2p", "all_to_all", "auto"):
        exercise(make_exchange(dist.group.WORLD, name))
    as_for_nccl = PointToPointExchange(dist.group.WORLD)
    as_for_nccl._batched = True
    exercise(as_for_nccl)
    (folder / f"ok-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    gloo_rank(int(sys.argv[1]), Path(sys.argv[2]))
