"""A SLURM cluster of two nodes on this machine: real daemons, on loopback, in the foreground."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("n1", "n2")
START_S = 30

# cred_expire also is how long a job waits that is queued again. Nodes may claim more CPUs than the
# machine has. A job of partition `high` takes the nodes from those of `low`, at once, and of
# `grace`, which have some time left.
CONFIG = """
ClusterName=distmoe
SlurmctldHost=localhost
SlurmctldPort={control_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=20
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1,batch_sched_delay=0
PropagateResourceLimits=NONE
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs=8\n"


class SlurmCluster:
    """Commands of a cluster that is up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # Two ranks share the address of the machine.
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def run(self, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            timeout=timeout,
        )

    def submit(self, *command: str) -> str:
        """The number of the job that sbatch, or what becomes it, says."""
        done = self.run(*command)
        found = re.search(r"Submitted batch job (\d+)", done.stdout)
        assert found, done.stdout
        return found[1]

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def wait_for_end(self, number: str, timeout: float = 60) -> dict[str, str]:
        """The fields of a job that is over, in whatever way."""
        wait_until(lambda: self.job(number)["JobState"] in ENDS, timeout)
        return self.job(number)


ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


def wait_until(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"nothing happened in {timeout} seconds"
        time.sleep(0.1)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Two nodes in ``folder``; skips the test where there can be none."""
    missing = [program for program in PROGRAMS if _find(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip("needs root and, of Debian, slurmctld slurmd slurm-client munge")
    cluster = SlurmCluster(folder)
    _write_config(folder)
    with ExitStack() as daemons:
        for command in _commands(folder):
            daemons.enter_context(_daemon(folder, command, cluster.environment))
        daemons.callback(_cancel_all, cluster)
        wait_until((folder / "munge.sock").exists, START_S)
        # sinfo calls nodes idle before they have registered.
        ready = ["srun", "--nodes=2", "--ntasks-per-node=1", "true"]
        wait_until(lambda: cluster.run(*ready).returncode == 0, START_S)
        yield cluster


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _write_config(folder: Path) -> None:
    (folder / "state").mkdir()
    # munged wants a folder that nobody else can write to.
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    with ExitStack() as probes:
        control_port, *ports = (_free_port(probes) for _ in range(1 + len(NODES)))
    text = CONFIG.format(folder=folder, control_port=control_port)
    nodes = [NODE.format(name=name, port=port) for name, port in zip(NODES, ports, strict=True)]
    (folder / "slurm.conf").write_text(text + "".join(nodes))
    for name in NODES:
        (folder / f"spool-{name}").mkdir()


def _commands(folder: Path) -> Iterator[list[str]]:
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid"}
    files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
    options = [f"--{name}={folder / file}" for name, file in files.items()]
    yield ["munged", "--foreground", "--force", *options]
    yield ["slurmctld", "-D", "-c"]
    for name in NODES:
        yield ["slurmd", "-D", "-c", "-N", name]


@contextmanager
def _daemon(folder: Path, command: list[str], environment: dict[str, str]) -> Iterator[None]:
    program, *arguments = command
    with (folder / f"{program}.log").open("a") as log:
        process = subprocess.Popen(
            [str(_find(program)), *arguments], stdout=log, stderr=log, env=environment
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                # munged takes its time.
                process.kill()
                process.wait()


def _cancel_all(cluster: SlurmCluster) -> None:
    cluster.run("scancel", "--full", "--signal=KILL", "--user=root")
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.run("squeue", "--noheader").stdout.strip(), START_S)


def _free_port(probes: ExitStack) -> int:
    probe = probes.enter_context(socket.socket())
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])
