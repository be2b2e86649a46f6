"""Non-blocking MPI messages from host memory, by mpi4py.

For machines whose fast network speaks MPI only. Rows on a GPU pass through pinned host memory, so
the host waits for the device when it sends. Most MPI libraries move large messages only while some
thread is inside MPI, here while a rank waits; MPICH has MPICH_ASYNC_PROGRESS=1 against that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Message, Transfer
from distmoe.comm.message import Way
from distmoe.comm.torch_group import TorchGroup, num_bytes

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    # RuntimeError: mpi4py is there, and finds no MPI library.
    raise ImportError(
        f"the exchange 'mpi' needs mpi4py and an MPI library ({error}): "
        "pip install 'distmoe[mpi]' mpich"
    ) from error

# Bytes of one message; more goes in pieces. MPI 3 counts in 32-bit integers.
LARGEST_MESSAGE = 1 << 30
# Every MPI has so many tags; transfers with the same one are never in flight together.
TAGS = 1 << 15

# A wait first spins, as messages inside a node take microseconds, then gives the core away.
SPIN_S = 1e-3
NAP_S = 5e-5


class MpiExchange(TorchGroup):
    """Isend and Irecv between the ranks of ``group``, in a communicator of its own; small
    collectives are the group's. Made by all processes of the run together."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        mpi_rank_of = _mpi_ranks()
        members = MPI.COMM_WORLD.Get_group().Incl(
            [mpi_rank_of[rank] for rank in dist.get_process_group_ranks(group)]
        )
        self._comm = MPI.COMM_WORLD.Create_group(members)

    def _receive(self, transfer: Transfer) -> None:
        transfer.arriving = self._start("receive", transfer.recv, transfer.tag)

    def _send(self, transfer: Transfer) -> None:
        transfer.leaving = self._start("send", transfer.send, transfer.tag)

    def _start(self, way: Way, rows_of: Mapping[int, Tensor], tag: int) -> list[Message]:
        host = {peer: _on_host(rows, filled=way == "send") for peer, rows in rows_of.items()}
        if any(rows.is_cuda for rows in rows_of.values()) and way == "send":
            torch.cuda.current_stream().synchronize()
        start = self._comm.Isend if way == "send" else self._comm.Irecv
        messages = []
        for peer, rows in rows_of.items():
            requests = [start(piece, peer, tag % TAGS) for piece in _pieces(host[peer])]
            unstaged = (rows, host[peer]) if way == "receive" and rows.is_cuda else None
            finish = partial(self._finish, requests, unstaged)
            messages.append(Message(way, peer, num_bytes(rows), finish))
        return messages

    def _finish(self, requests: list[Any], unstaged: tuple[Tensor, Tensor] | None) -> None:
        began = time.perf_counter()
        while not MPI.Request.Testall(requests):
            seconds = time.perf_counter() - began
            if seconds > self.observer.timeout_s:
                raise TimeoutError(f"an MPI message is not complete after {seconds:.0f} s")
            if seconds > SPIN_S:
                time.sleep(NAP_S)
        if unstaged is not None:
            rows, host = unstaged
            rows.copy_(host, non_blocking=True)


def _mpi_ranks() -> list[int]:
    """For every rank of the run its MPI rank; collective. RuntimeError if MPI has others."""
    world, size = dist.get_world_size(), MPI.COMM_WORLD.Get_size()
    if size != world:
        raise RuntimeError(
            f"moe.dispatch.exchange is 'mpi'; MPI has {size} rank{'s' if size > 1 else ''} and the "
            f"run {world}: start it as mpiexec -n {world} distmoe train FILE, with the mpiexec of "
            "this MPI library; under SLURM with its plug-in, such as srun --mpi=pmi2 (srun "
            "--mpi=list names them)"
        )
    ranks: list[int] = MPI.COMM_WORLD.allgather(dist.get_rank())
    if sorted(ranks) != list(range(world)):
        raise RuntimeError(f"the MPI processes are the ranks {ranks}, not each of 0..{world - 1}")
    return [ranks.index(rank) for rank in range(world)]


def _on_host(rows: Tensor, *, filled: bool) -> Tensor:
    """``rows`` themselves, or pinned memory of their size, which the device is told to fill."""
    if not rows.is_cuda:
        return rows
    host = torch.empty(rows.shape, dtype=rows.dtype, device="cpu", pin_memory=True)
    return host.copy_(rows, non_blocking=True) if filled else host


def _pieces(rows: Tensor) -> list[Any]:
    """The bytes of contiguous ``rows`` in order, as buffers that MPI can count."""
    data = rows.detach().view(-1).view(torch.uint8)
    return [[piece.numpy(), MPI.BYTE] for piece in torch.split(data, LARGEST_MESSAGE)]
