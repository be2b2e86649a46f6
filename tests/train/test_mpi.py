"""A run under mpiexec whose rows travel by MPI."""

from __future__ import annotations

from pathlib import Path

import pytest
from launched_by_mpi import mpiexec, needs_mpi
from training_runs import config_file, finish, learning, records, start

pytestmark = [pytest.mark.processes, needs_mpi]

MPI = ["--moe.dispatch.exchange", "mpi"]
SHORT = ["--train.steps", "4"]


def test_mpi_gives_the_same_run_as_point_to_point(data: Path, tmp_path: Path) -> None:
    p2p, mpi = config_file(tmp_path / "p2p", data), config_file(tmp_path / "mpi", data)
    finish(start(p2p, *SHORT))
    done = mpiexec(2, ["-m", "distmoe", "train", str(mpi), *MPI, *SHORT, "--train.trace_steps=2"])
    assert done.returncode == 0, done.stdout
    assert "MpiExchange" in done.stdout
    assert len(records(mpi)) == 4
    assert learning(mpi) == learning(p2p)
    assert len(list((tmp_path / "mpi" / "run" / "trace").iterdir())) == 2


def test_a_run_without_mpiexec_is_told_so(data: Path, tmp_path: Path) -> None:
    output = finish(start(config_file(tmp_path / "alone", data), *MPI, *SHORT), code=1)
    assert "MPI has 1 rank and the run 2: start it as mpiexec -n 2" in output
