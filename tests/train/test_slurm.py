"""Training as SLURM jobs of two nodes, by a real SLURM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_until
from training_runs import CONSTANT, LONG, config_file, learning, records

pytestmark = pytest.mark.processes

DISTMOE = [sys.executable, "-m", "distmoe"]
TWO_NODES = ["--nodes=2", "--ranks-per-node=1"]
SHORT = [*CONSTANT, "--train.steps=4"]


def test_preempted_job_gives_the_losses_of_an_unbroken_run(
    slurm: SlurmCluster, long_run: Path, data: Path, tmp_path: Path
) -> None:
    config = config_file(tmp_path / "preempted", data)
    launch = [*DISTMOE, "launch", "slurm", str(config), *TWO_NODES, "--launcher-args=--exclusive"]
    job = slurm.submit(*launch, *LONG)
    wait_until(lambda: len(records(config)) >= 3, 120)
    other = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null"]
    slurm.submit("sbatch", *other, "--wrap=true")
    end = slurm.wait_for_end(job, 180)
    folder = config.parent / "run"
    log = (folder / "slurm" / f"distmoe-{job}.out").read_text()
    assert (end["JobState"], end["Restarts"], end["ExitCode"]) == ("COMPLETED", "1", "0:0"), log
    assert "stopped by a signal at step" in log
    assert f"resumed from {folder}/checkpoints/step-" in log
    assert "Traceback" not in log
    assert len(records(config)) == 100
    assert learning(config) == learning(long_run)


def test_srun_without_torchrun(
    slurm: SlurmCluster, long_run: Path, data: Path, tmp_path: Path
) -> None:
    """A task is a rank."""
    config = config_file(tmp_path / "srun", data)
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1"]
    done = slurm.run(*srun, *DISTMOE, "train", str(config), *SHORT, timeout=120)
    assert done.returncode == 0, done.stdout
    assert "ranks from      slurm" in done.stdout
    assert learning(config) == learning(long_run)[:4]
