"""Where ranks of mpirun meet without MASTER_ADDR. The real thing: tests/train/test_launchers.py."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace

import pytest

from distmoe.config import ConfigError
from distmoe.launch.mpi_address import rank_0_address


@pytest.fixture
def world_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    world = SimpleNamespace(Get_size=lambda: 2, bcast=lambda mine, root: mine)
    mpi = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "MPICH 5\nmore")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))


def test_without_mpi4py_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match="or export MASTER_ADDR and MASTER_PORT before mpirun"):
        rank_0_address(2, one_node=True)


@pytest.mark.usefixtures("world_of_two")
def test_another_number_of_ranks_is_explained() -> None:
    with pytest.raises(ConfigError, match="2 ranks where mpirun started 4: .* one of MPICH 5$"):
        rank_0_address(4, one_node=True)


@pytest.mark.usefixtures("world_of_two")
@pytest.mark.parametrize(
    ("one_node", "resolved", "expected"),
    [
        (True, "10.0.0.7", "127.0.0.1"),
        (False, "10.0.0.7", "10.0.0.7"),
        (False, "127.0.1.1", "node7"),
    ],
)
def test_address_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, one_node: bool, resolved: str, expected: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(socket, "gethostbyname", lambda name: resolved)
    address, port = rank_0_address(2, one_node=one_node)
    assert address == expected
    with socket.socket() as server:
        server.bind(("", port))
