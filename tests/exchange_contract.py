"""What every transport must do. Run as a program, RANK WORLD FOLDER BACKEND, it is one rank of
several processes: on CPUs with gloo, on a GPU each with nccl."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from distmoe.comm import Exchange, make_exchange
from distmoe.comm.torch_group import new_row_group
from distmoe.comm.torch_p2p import PointToPointExchange


def rows_for(source: int, target: int) -> torch.Tensor:
    """Ragged: some pairs of ranks exchange nothing."""
    count = (source + 2 * target) % 4
    return torch.arange(count * 3.0).view(count, 3) + 100 * source + 10 * target


def exercise(exchange: Exchange) -> None:
    """Two transfers in flight at once, of different sizes and kinds, a gather and a sum; on the
    default device."""
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


def overlapping(exchange: Exchange, *, rounds: int, rows: int) -> None:
    """Many transfers of which the last few are always in flight, of rows that nobody else holds,
    while memory is taken and filled again as soon as it is free; on the default device."""
    rank, peers = exchange.rank, [p for p in range(exchange.size) if p != exchange.rank]
    wrong, flights = torch.zeros(()), []
    for number in range(rounds):
        recv = {p: torch.empty(rows, 16) for p in peers}
        transfer = exchange.post_recv("rows", recv)
        exchange.post_send(transfer, {p: torch.full((rows, 16), rank + 0.5) for p in peers})
        flights.append((transfer, recv))
        if len(flights) > number % 4:
            transfer, recv = flights.pop(0)
            exchange.wait_recv(transfer)
            wrong += sum((buffer != p + 0.5).sum() for p, buffer in recv.items())
            exchange.wait_send(transfer)
        del recv, transfer
        # Where something was let go too early, this gets its memory.
        torch.full((rows, 16), float("nan"))
    for transfer, _ in flights:
        exchange.wait_recv(transfer)
        exchange.wait_send(transfer)
    assert int(wrong) == 0


def run_rank(rank: int, world: int, folder: Path, backend: str) -> None:
    device, rows = torch.device("cpu"), 40
    if backend == "nccl":
        # As `distmoe.runtime` does.
        device, rows, backend = torch.device("cuda", rank), 20_000, "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
        torch.set_default_device(device)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        device_id=device if device.type == "cuda" else None,
    )
    group = new_row_group(range(world))
    for name in ("p2p", "all_to_all", "auto"):
        exercise(make_exchange(group, name))
        overlapping(make_exchange(group, name), rounds=20, rows=rows)
    if device.type == "cpu":
        as_for_nccl = PointToPointExchange(group)
        as_for_nccl._batched = True
        exercise(as_for_nccl)
    (folder / f"ok-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
