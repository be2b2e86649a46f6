"""The same run by every launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launched_by_mpi import needs_mpi
from training_runs import CONSTANT, config_file, learning

pytestmark = pytest.mark.processes


@pytest.mark.parametrize(
    ("launcher", "source"),
    [
        ("torchrun", "torchrun"),
        ("deepspeed", "deepspeed"),
        pytest.param("mpi", "mpi", marks=needs_mpi),
    ],
)
def test_launch_gives_the_same_run(
    launcher: str, source: str, long_run: Path, data: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / launcher, data)
    command = ["launch", launcher, str(config), *CONSTANT, "--train.steps=4"]
    done = subprocess.run(
        [sys.executable, "-m", "distmoe", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert done.returncode == 0, done.stdout
    assert f"ranks from      {source}" in done.stdout
    assert learning(config) == learning(long_run)[:4]
