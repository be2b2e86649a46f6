"""When train.sbatch queues its job again, under a real SLURM; Python is a few lines of shell."""

from __future__ import annotations

import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, wait_until

from distmoe.launch.slurm import TEMPLATE, render

pytestmark = pytest.mark.processes

# `distmoe config` prints the folder; the agent and its ranks are one process, which stays until a
# signal and then saves, unless it was told to end by itself.
FAKE_PYTHON = """#!/bin/bash
folder=@FOLDER@
case " $* " in
  *" config "*) [ "${CONFIG_CODE:-0}" = 0 ] && echo "$folder"; exit "${CONFIG_CODE:-0}" ;;
esac
save() { sleep 1; [ -z "${SAVES:-}" ] || echo "step 3 of 9" >"$folder/STOPPED"; exit 143; }
trap save TERM USR1
echo "$*" >>"$folder/starts"
[ "${SLURM_RESTART_COUNT:-0}" -lt "${ENDS_AT:-1}" ] || exit "${CODE:-0}"
while :; do sleep 0.1; done
"""


@dataclass
class Trial:
    """A job of the fake run, and what is done to it."""

    cluster: SlurmCluster
    folder: Path
    job: str = ""

    def submit(self, *options: str, **variables: object) -> None:
        """sbatch by hand, with variables of its environment."""
        self.folder.mkdir()
        python = self.folder / "python3"
        python.write_text(FAKE_PYTHON.replace("@FOLDER@", str(self.folder)))
        python.chmod(0o755)
        script = self.folder / "train.sbatch"
        script.write_text(render(TEMPLATE.read_text(), {}, {"PYTHON": f"({python})"}))
        given = [f"{name}={value}" for name, value in variables.items()]
        log = f"--output={self.folder}/log"
        self.job = self.cluster.submit(
            "env", *given, "sbatch", log, *options, str(script), "run.toml", "--train.steps=9"
        )

    def started(self, times: int = 1) -> None:
        """Wait until the run has begun so many times."""
        starts = self.folder / "starts"
        wait_until(lambda: starts.exists() and len(starts.read_text().splitlines()) >= times)

    def signal(self, name: str) -> None:
        """To the batch script alone, as at the time limit."""
        self.cluster.run("scancel", "--batch", f"--signal={name}", self.job)

    def end(self) -> tuple[str, str, str]:
        """State, restarts and exit code of the job when it is over."""
        fields = self.cluster.wait_for_end(self.job)
        return fields["JobState"], fields["Restarts"], fields["ExitCode"]

    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text() if log.exists() else ""


@pytest.fixture
def trial(slurm: SlurmCluster, tmp_path: Path) -> Trial:
    return Trial(slurm, tmp_path / "run")


@pytest.fixture(scope="module")
def queued_again(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trial]:
    """Three jobs after a signal: they wait together, as SLURM lets a job start again after 5 s."""
    folder = tmp_path_factory.mktemp("trials")
    trials = {name: Trial(slurm, folder / name) for name in ("saved", "early", "grace")}
    trials["saved"].submit("--nodes=2", SAVES=1, RANKS_PER_NODE=3)
    trials["early"].submit("--nodelist=n2")
    trials["saved"].started(2)
    trials["saved"].signal("USR1")
    trials["early"].started()
    trials["early"].signal("USR1")
    trials["grace"].submit("--partition=grace", "--exclusive", "--nodelist=n1")
    trials["grace"].started()
    other = ["--partition=high", "--exclusive", "--nodelist=n1", "--output=/dev/null"]
    slurm.submit("sbatch", *other, "--wrap=true")
    return trials


def test_time_limit_queues_a_saved_run_again(queued_again: dict[str, Trial]) -> None:
    trial = queued_again["saved"]
    assert trial.end() == ("COMPLETED", "1", "0:0")
    assert "step 3 of 9: queued again" in trial.log()
    first, second, *_ = (trial.folder / "starts").read_text().splitlines()
    assert "--nproc-per-node=3" in first
    assert "--nnodes=2 --master-addr=127.0.0.1" in first
    assert second.endswith("-m distmoe train run.toml --train.steps=9")
    ports = re.findall(r"--master-port=(\d+)", (trial.folder / "starts").read_text())
    assert ports[0] == ports[1] != ports[2]
    assert not (trial.folder / "STOPPED").exists()


def test_time_limit_before_training_queues_the_job_again(queued_again: dict[str, Trial]) -> None:
    assert "before training: queued again" in queued_again["early"].log()
    assert queued_again["early"].end() == ("COMPLETED", "1", "0:0")


def test_preemption_with_a_grace_time_queues_the_job_again(queued_again: dict[str, Trial]) -> None:
    """SLURM signals the ranks alone, here before they could save, and would call the job failed."""
    assert queued_again["grace"].end() == ("COMPLETED", "1", "0:0")


def test_cancelled_job_is_not_queued_again(trial: Trial) -> None:
    trial.submit(SAVES=1)
    trial.started()
    trial.cluster.run("scancel", trial.job)
    assert trial.end()[:2] == ("CANCELLED", "0")
    assert (trial.folder / "STOPPED").exists()
    wait_until(lambda: "left to SLURM" in trial.log())
    time.sleep(1)
    assert trial.cluster.job(trial.job)["JobState"] == "CANCELLED"


def test_failed_job_is_not_queued_again(trial: Trial) -> None:
    trial.submit(ENDS_AT=0, CODE=3)
    assert trial.end() == ("FAILED", "0", "3:0")
    assert "failed with 3: not queued again" in trial.log()


def test_limit_of_requeues(trial: Trial) -> None:
    trial.submit(SAVES=1, MAX_REQUEUES=0)
    trial.started()
    trial.signal("USR1")
    assert trial.end() == ("FAILED", "0", "75:0")


def test_wrong_setting_starts_nothing(trial: Trial) -> None:
    trial.submit(CONFIG_CODE=2)
    assert trial.end() == ("FAILED", "0", "2:0")
    assert not (trial.folder / "starts").exists()


def test_tasks_of_an_array_are_runs_of_their_own(trial: Trial) -> None:
    trial.submit("--array=3,5", ENDS_AT=0)
    wait_until(lambda: trial.log().count("finished") == 2)
    starts = (trial.folder / "starts").read_text().splitlines()
    folders = {line.split("--run.dir ")[1] for line in starts}
    assert folders == {f"{trial.folder}/3", f"{trial.folder}/5"}


def test_elastic_job_meets_by_c10d(trial: Trial) -> None:
    trial.submit("--nodes=2", "--no-kill", ENDS_AT=0, MIN_NODES=1, MAX_RESTARTS=7)
    assert trial.end()[0] == "COMPLETED"
    starts = (trial.folder / "starts").read_text()
    assert "--nnodes=1:2 --max-restarts=7 --rdzv-backend=c10d" in starts


def test_sbatch_accepts_the_template(slurm: SlurmCluster) -> None:
    done = slurm.run("sbatch", "--test-only", "--nodes=2", str(TEMPLATE), "run.toml")
    assert done.returncode == 0, done.stdout
    assert "to start at" in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_has_nothing_to_say(slurm: SlurmCluster) -> None:
    done = slurm.run("shellcheck", str(TEMPLATE))
    assert (done.returncode, done.stdout) == (0, "")
