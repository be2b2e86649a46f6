"""The exchange over MPI, under a real mpiexec."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched_by_mpi import mpiexec, needs_mpi

pytestmark = [pytest.mark.processes, needs_mpi]


def test_contract_on_three_ranks(tmp_path: Path) -> None:
    """Also with rows in pieces, over a group of some ranks, and with other rank numbers."""
    done = mpiexec(3, [str(Path(__file__).with_name("mpi_rank.py")), str(tmp_path)])
    assert done.returncode == 0, done.stdout
    assert sorted(path.name for path in tmp_path.glob("ok-*")) == ["ok-0", "ok-1", "ok-2"]
