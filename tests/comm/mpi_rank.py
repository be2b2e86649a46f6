"""One rank of the contract under mpiexec. Ranks of the run are those of MPI, turned by one."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from exchange_contract import exercise
from mpi4py import MPI

import distmoe.comm.mpi as mpi_exchange
from distmoe.comm import make_exchange


def main(folder: Path) -> None:
    world = MPI.COMM_WORLD.Get_size()
    rank = (MPI.COMM_WORLD.Get_rank() + 1) % world
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    exercise(make_exchange(dist.group.WORLD, "mpi"))
    # Rows of 12 bytes, cut in the middle of a number.
    mpi_exchange.LARGEST_MESSAGE = 7
    assert len(mpi_exchange._pieces(torch.zeros(1, 3))) == 2
    exercise(make_exchange(dist.group.WORLD, "mpi"))
    # Every process makes the exchange of its own group.
    groups = [dist.new_group([0, 2]), dist.new_group([1])]
    exercise(make_exchange(groups[rank % 2], "mpi"))
    (folder / f"ok-{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
