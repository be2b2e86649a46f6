"""Where the ranks of mpirun meet, if MASTER_ADDR does not say: rank 0 tells the others, by MPI."""

from __future__ import annotations

import socket

from distmoe.config import ConfigError
from distmoe.launch.ports import free_port


def rank_0_address(world: int, *, one_node: bool) -> tuple[str, int]:
    """An address of rank 0 and a port that is free there; collective.

    ConfigError without mpi4py, or if its MPI library sees another number of ranks than ``world``.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"MASTER_ADDR is not set, and MPI cannot tell where rank 0 is ({error}): "
            "pip install 'distmoe[mpi]', or export MASTER_ADDR and MASTER_PORT before mpirun"
        ) from error
    size = MPI.COMM_WORLD.Get_size()
    if size != world:
        raise ConfigError(
            f"the MPI library of mpi4py has {size} rank{'s' if size > 1 else ''} where mpirun "
            f"started {world}: mpirun belongs to another MPI; take the one of "
            f"{MPI.Get_library_version().splitlines()[0].strip()}"
        )
    mine = ("127.0.0.1" if one_node else _own_address(), free_port())
    address: tuple[str, int] = MPI.COMM_WORLD.bcast(mine, root=0)
    return address


def _own_address() -> str:
    """This host's address; its name, where /etc/hosts calls that a loopback address."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    return name if address.startswith("127.") else address
