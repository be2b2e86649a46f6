"""The same run by every launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched_by_mpi import needs_mpi
from training_runs import CONSTANT, config_file, finish, learning, start

pytestmark = pytest.mark.processes


MPI = ["--moe.dispatch.exchange=mpi", "--train.trace_steps=2"]


@pytest.mark.parametrize(
    ("launcher", "options", "says"),
    [
        ("torchrun", [], "mesh            2 ranks"),
        # With rows that travel by MPI.
        pytest.param("mpi", MPI, "MpiExchange", marks=needs_mpi),
    ],
)
def test_launch_gives_the_same_run(
    launcher: str, options: list[str], says: str, long_run: Path, data: Path, tmp_path: Path
) -> None:
    """DeepSpeed's launcher is in test_deepspeed.py."""
    config = config_file(tmp_path / launcher, data)
    command = ["launch", launcher, str(config), *CONSTANT, "--train.steps=4", *options]
    done = subprocess.run(
        [sys.executable, "-m", "distmoe", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stdout
    assert f"ranks from      {launcher}" in done.stdout
    assert says in done.stdout
    assert learning(config) == learning(long_run)[:4]
    traces = list((config.parent / "run").glob("trace/*"))
    assert len(traces) == (2 if options else 0)


@needs_mpi
def test_a_run_by_mpi_without_mpiexec_is_told_so(data: Path, tmp_path: Path) -> None:
    output = finish(start(config_file(tmp_path / "alone", data), MPI[0]), code=1)
    assert "MPI has 1 rank and the run 2: start it as mpiexec -n 2" in output
    assert "srun --mpi=pmi2" in output
