"""Checks of processors, limits, disks, network, launcher, variables and the run."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch_doctor import DEVICE, Answers, torch_with

from distmoe.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LaunchConfig,
    RankInfo,
    RunConfig,
)
from distmoe.launch.doctor import (
    cgroup,
    communication,
    disk,
    launcher,
    limits,
    network,
    processors,
    run,
    variables,
    versions,
)
from distmoe.launch.doctor.finding import Finding
from distmoe.launch.doctor.network import Interface
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]
SLURM = {"SLURM_JOB_ID": "7"}
STEP = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
SLURM_RANKS = RankInfo(rank=1, world=8, local_rank=1, local_world=4, source="slurm")
NICS = [
    Interface("lo", "127.0.0.1", True, 65536),
    Interface("docker0", "172.17.0.1", False, 1500),
    Interface("eth0", "10.0.0.5", False, 1500),
]


def like(finding: Finding, status: str, words: str) -> bool:
    """With the whole of it where it is not."""
    assert (finding.status, words in finding.seen) == (status, True), finding
    assert bool(finding.fix) is (status in ("warn", "fail"))
    return True


@pytest.mark.parametrize(
    ("check", "fields", "status", "words"),
    [
        ("ranks", {}, "pass", "no launcher"),
        ("ranks", {"ranks": SLURM_RANKS}, "pass", "slurm: rank 1 of 8, 4 on this machine"),
        ("ranks", {"launcher_problem": "RANK is 'x'"}, "fail", "RANK is 'x'"),
        ("SLURM step", {}, "skip", "not in a SLURM job"),
        ("SLURM step", {"variables": SLURM}, "pass", "job 7, outside of srun"),
        ("SLURM step", {"variables": {**STEP, "SLURM_PROCID": "7"}}, "pass", "8 tasks on 2 nodes"),
        ("SLURM step", {"variables": {**STEP, "SLURM_PROCID": "8"}}, "fail", "SLURM_PROCID is '8'"),
        ("SLURM GPUs", {"variables": SLURM}, "skip", "the job has no GPUs here"),
        (
            "SLURM GPUs",
            {"variables": {**STEP, "SLURM_GPUS_ON_NODE": "4"}, "ranks": SLURM_RANKS},
            "pass",
            "4 tasks and 4 GPUs",
        ),
        (
            "SLURM GPUs",
            {"variables": STEP, "ranks": SLURM_RANKS, "probes": torch_with(DEVICE)},
            "fail",
            "4 tasks and 1 GPUs",
        ),
        (
            "SLURM GPUs",
            {"variables": {**SLURM, "SLURM_GPUS_ON_NODE": "8"}},
            "warn",
            "1 tasks and 8 GPUs",
        ),
        (
            "SLURM GPUs",
            {
                "variables": {**SLURM, "SLURM_GPUS_ON_NODE": "8"},
                "ranks": replace(SLURM_RANKS, source="torchrun"),
            },
            "pass",
            "1 tasks and 8 GPUs",
        ),
        (
            "SLURM GPUs",
            {"variables": {**STEP, "SLURM_GPUS_PER_TASK": "1"}},
            "warn",
            "SLURM_GPUS_PER_TASK is 1",
        ),
        ("SLURM cores", {"variables": STEP}, "pass", "not set"),
        ("SLURM cores", {"variables": {**STEP, "SLURM_CPUS_PER_TASK": "9"}}, "pass", "9 a task"),
        (
            "SLURM cores",
            {"variables": {**SLURM, "SLURM_CPUS_PER_TASK": "9"}},
            "warn",
            "of which srun knows nothing",
        ),
    ],
)
def test_launcher(
    situation: Make, check: str, fields: dict[str, Any], status: str, words: str
) -> None:
    assert like(launcher.CHECKS[check](situation(**fields)), status, words)


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("JobId=7 Requeue=1 Restarts=0", "pass", "may be queued again"),
        ("JobId=7 Requeue=0 Restarts=0", "warn", "not queued again"),
        ("", "skip", "scontrol does not tell: Invalid job id"),
    ],
)
def test_requeue(
    situation: Make, monkeypatch: pytest.MonkeyPatch, text: str, status: str, words: str
) -> None:
    told = SimpleNamespace(stdout=text, stderr="Invalid job id")
    monkeypatch.setattr(launcher.subprocess, "run", lambda *args, **options: told)
    assert like(launcher.slurm_requeue(situation(variables=SLURM)), status, words)


@pytest.mark.parametrize(
    ("check", "fields", "status", "words"),
    [
        ("set", {"variables": {"HOME": "/"}}, "pass", "none of NCCL_*"),
        ("set", {"variables": {"NCCL_DEBUG": "INFO", "A": "1"}}, "pass", "NCCL_DEBUG=INFO"),
        ("hurtful", {"variables": {"NCCL_DEBUG": "INFO"}}, "pass", "none of those"),
        ("hurtful", {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "warn", "nothing overlaps"),
        ("hurtful", {"variables": {"TORCH_DISTRIBUTED_DEBUG": "detail"}}, "warn", "checked by"),
        ("CUDA_VISIBLE_DEVICES", {}, "pass", "not set"),
        ("CUDA_VISIBLE_DEVICES", {"variables": {"CUDA_VISIBLE_DEVICES": "-1"}}, "warn", "hides"),
        (
            "CUDA_VISIBLE_DEVICES",
            {
                "variables": {"CUDA_VISIBLE_DEVICES": ""},
                "config": Config(run=RunConfig(device="cuda")),
            },
            "fail",
            "'' hides all GPUs, and run.device is 'cuda'",
        ),
        (
            "CUDA_VISIBLE_DEVICES",
            {"variables": {"CUDA_VISIBLE_DEVICES": "0"}, "local_world": 4},
            "warn",
            "1 GPUs for 4 ranks",
        ),
        ("NCCL_SOCKET_IFNAME", {}, "skip", "not set"),
        ("NCCL_SOCKET_IFNAME", {"variables": {"NCCL_SOCKET_IFNAME": "eth"}}, "pass", "eth"),
        ("NCCL_SOCKET_IFNAME", {"variables": {"NCCL_SOCKET_IFNAME": "^lo"}}, "pass", "all but lo"),
        ("NCCL_SOCKET_IFNAME", {"variables": {"NCCL_SOCKET_IFNAME": "=eth"}}, "fail", "'eth' is"),
        ("GLOO_SOCKET_IFNAME", {"variables": {"GLOO_SOCKET_IFNAME": "eth"}}, "fail", "not here"),
        ("GLOO_SOCKET_IFNAME", {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}}, "pass", "eth0"),
    ],
)
def test_variables(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    fields: dict[str, Any],
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(variables, "interfaces", lambda: NICS)
    assert like(variables.CHECKS[check](situation(**fields)), status, words)


@pytest.mark.parametrize(
    ("check", "address", "fields", "status", "words"),
    [
        ("host name", "10.0.0.5", {"world": 2}, "pass", "is 10.0.0.5"),
        ("host name", "127.0.1.1", {}, "pass", "is 127.0.1.1"),
        ("host name", "127.0.1.1", {"world": 2}, "fail", "other machines cannot reach it"),
        ("host name", None, {}, "warn", "does not resolve"),
        ("host name", None, {"world": 2}, "fail", "does not resolve"),
        ("gloo takes", "10.0.0.5", {}, "pass", "eth0 (10.0.0.5, MTU 1,500), by the host name"),
        ("gloo takes", None, {}, "warn", "loopback"),
        (
            "gloo takes",
            None,
            {"variables": {"GLOO_SOCKET_IFNAME": "eth0"}},
            "pass",
            "by GLOO_SOCKET_IFNAME",
        ),
        ("NCCL takes", None, {"world": 2}, "pass", "eth0 (10.0.0.5"),
        (
            "NCCL takes",
            None,
            {"variables": {"NCCL_SOCKET_IFNAME": "^lo"}},
            "pass",
            "^lo, by NCCL_SOCKET_IFNAME",
        ),
    ],
)
def test_network(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    address: str | None,
    fields: dict[str, Any],
    status: str,
    words: str,
) -> None:
    def look_up(name: str) -> str:
        if address is None:
            raise socket.gaierror(-2, "Name or service not known")
        return address

    monkeypatch.setattr(socket, "gethostbyname", look_up)
    monkeypatch.setattr(network, "interfaces", lambda: NICS)
    assert like(network.CHECKS[check](situation(**fields)), status, words)


def test_interfaces_of_several_networks(situation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        network, "interfaces", lambda: [*NICS, Interface("ib0", "10.1.0.5", False, 4092)]
    )
    assert like(network.nccl_interface(situation()), "pass", "ib0 (10.1.0.5, MTU 4,092)")
    assert like(network.nccl_interface(situation(world=2)), "warn", "one of ib0 (10.1.0.5")


def test_interfaces_of_this_machine() -> None:
    (loopback,) = [one for one in network.interfaces() if one.address == "127.0.0.1"]
    assert (loopback.loopback, loopback.mtu > 1000) == (True, True)


@pytest.mark.parametrize(
    ("states", "status", "words"),
    [
        ([], "skip", "no InfiniBand"),
        (["4: ACTIVE"], "pass", "mlx5_0:1 400 Gb/sec"),
        (["4: ACTIVE", "1: DOWN"], "warn", "mlx5_0:1 400 Gb/sec; mlx5_1:1 DOWN"),
        (["1: DOWN"], "fail", "no port is active: mlx5_0:1 DOWN"),
    ],
)
def test_infiniband(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    states: list[str],
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(network, "INFINIBAND", tmp_path)
    for number, state in enumerate(states):
        port = tmp_path / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(state + "\n")
        (port / "rate").write_text("400 Gb/sec (4X NDR)\n")
    assert like(network.infiniband(situation()), status, words)


@pytest.fixture
def own_cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The root of cgroups, and of them that of a job, /job/step, of version 2."""
    monkeypatch.setattr(cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(cgroup, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/job/step\n")
    (tmp_path / "job/step").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("quota", "ranks", "status", "words"),
    [
        ("max 100000", 4, "pass", "4 may be used"),
        ("150000 100000", 1, "pass", "time for 1.5 by the cgroup"),
        ("150000 100000", 2, "warn", "2 ranks want 2"),
        ("max 100000", 8, "warn", "8 ranks want 8"),
    ],
)
def test_cores(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    own_cgroup: Path,
    quota: str,
    ranks: int,
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    (own_cgroup / "job/cpu.max").write_text(quota + "\n")
    (own_cgroup / "job/step/cpu.max").write_text("max 100000\n")
    assert like(processors.cores(situation(local_world=ranks)), status, words)
    # Version 1 of cgroups has the same in two files, in a tree of its own; a container may tell
    # the path of its host, which it does not have.
    (own_cgroup / "own").write_text("4:cpu,cpuacct:/host/only\n1:name=systemd:/\n")
    (own_cgroup / "cpu").mkdir()
    for name, number in zip(("quota", "period"), quota.replace("max", "-1").split(), strict=True):
        (own_cgroup / f"cpu/cpu.cfs_{name}_us").write_text(number + "\n")
    assert like(processors.cores(situation(local_world=ranks)), status, words)


@pytest.mark.parametrize(
    ("threads", "variable", "status", "words"),
    [
        (0, None, "pass", "each rank its share"),
        (0, "2", "pass", "OMP_NUM_THREADS 2 x 2 ranks on 4 cores"),
        (0, "4", "warn", "OMP_NUM_THREADS 4 x 2 ranks on 4 cores"),
        (3, "1", "warn", "launch.threads 3 x 2 ranks on 4 cores"),
        (0, "many", "warn", "OMP_NUM_THREADS is 'many'"),
    ],
)
def test_threads(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    variable: str | None,
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(processors, "usable_cores", lambda: 4)
    found = situation(
        config=Config(launch=LaunchConfig(threads=threads)),
        local_world=2,
        variables={} if variable is None else {"OMP_NUM_THREADS": variable},
    )
    assert like(processors.threads(found), status, words)


def test_load_memory_and_processes(
    situation: Make, monkeypatch: pytest.MonkeyPatch, own_cgroup: Path
) -> None:
    monkeypatch.setattr(processors, "usable_cores", lambda: 4)
    for running, status in ((4.0, "pass"), (4.1, "warn")):
        monkeypatch.setattr(os, "getloadavg", lambda running=running: (running, 0.0, 0.0))
        assert like(processors.load(situation()), status, f"{running} running")
    monkeypatch.setattr(processors, "LEAST_BYTES", 1 << 20)
    assert like(processors.memory(situation()), "pass", "GiB available")
    for limit, status in (("max", "pass"), (str(2 << 20), "pass"), (str(1 << 19), "warn")):
        (own_cgroup / "job/memory.max").write_text(limit)
        assert like(processors.memory(situation()), status, "available")
    for most, status in (("max", "pass"), ("200", "pass"), ("199", "fail")):
        (own_cgroup / "job/step/pids.max").write_text(most)
        assert processors.processes(situation(local_world=2)).status == status


@pytest.mark.parametrize(
    ("check", "soft", "status"),
    [
        ("open files", 4096, "pass"),
        ("open files", 1024, "warn"),
        ("open files", -1, "pass"),
        ("locked memory", 65536, "warn"),
        ("locked memory", -1, "pass"),
        ("core files", 0, "pass"),
        ("stack", 1 << 20, "warn"),
        ("stack", 8 << 20, "pass"),
        ("user processes", 100, "warn"),
        ("user processes", -1, "pass"),
    ],
)
def test_limits(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    check: str,
    soft: int,
    status: str,
) -> None:
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(limits, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, -1))
    assert limits.CHECKS[check](situation()).status == status
    monkeypatch.setattr(limits, "INFINIBAND", tmp_path / "none")
    assert limits.locked_memory(situation()).status == "pass"


def test_many_ranks_want_many_files(situation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (4096, 8192))
    found = limits.files(situation(world=512))
    assert like(found, "warn", "4,096 open files (at most 8,192)")
    assert found.fix == "ulimit -n 8192"


def test_disks(situation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "PROBE_BYTES", 1 << 20)
    config = Config(run=RunConfig(dir=str(tmp_path / "a/b")), data=DataConfig(path=str(tmp_path)))
    found = situation(config=config)
    assert like(disk.run_room(found), "pass", f"GiB free in {tmp_path}")
    assert disk.run_speed(found).seen.endswith("for a small sync")
    assert list(tmp_path.iterdir()) == []
    assert like(disk.data_speed(found), "skip", "there is no shard")
    (tmp_path / "train-0.bin").write_bytes(b"0" * 4096)
    assert like(disk.data_speed(found), "pass", "0.0 MB of train-0.bin")
    few = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: few)
    assert like(disk.run_room(found), "warn", "0.0 GiB free")
    assert like(disk.temporary(found), "warn", "0.0 GiB free")
    monkeypatch.setattr(disk, "SLOW_BYTES_PER_S", float("inf"))
    assert like(disk.run_speed(found), "warn", str(tmp_path))
    monkeypatch.setattr(disk.os, "fsync", lambda file: os.close(-1))
    assert like(disk.run_speed(found), "fail", "Bad file descriptor")
    assert like(disk.data_room(situation()), "skip", "no FILE")


@pytest.mark.parametrize(("free", "status"), [(1 << 30, "pass"), (64 << 20, "warn")])
def test_shared_memory(
    situation: Make, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: (2 << 30, 0, free))
    assert like(disk.shared_memory(situation()), status, "of 2.00 GiB free")


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "status", "words"),
    [
        ("cpu", 0, 2, "pass", "2 ranks on this machine, on the CPU"),
        ("auto", 0, 2, "pass", "as there is no GPU"),
        ("auto", 2, 2, "pass", "2 ranks on this machine, 2 GPUs"),
        ("cuda", 1, 2, "fail", "2 ranks on this machine, 1 GPUs"),
        ("auto", 8, 2, "warn", "2 ranks on this machine, 8 GPUs"),
    ],
)
def test_ranks_and_devices(
    situation: Make, device: Any, gpus: int, ranks: int, status: str, words: str
) -> None:
    config = Config(run=RunConfig(device=device))
    found = situation(config=config, local_world=ranks, probes=torch_with(*[DEVICE] * gpus))
    assert like(run.ranks_and_devices(found), status, words)


def test_a_run(situation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for check in run.CHECKS.values():
        assert like(check(situation()), "skip", "no FILE")
    config = Config(
        run=RunConfig(dir=str(tmp_path)),
        data=DataConfig(path=str(tmp_path)),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=50),
    )
    found = situation(config=config, probes=Answers(parameters={"count": 1 << 20}))
    assert like(run.settings(found), "fail", "no manifest.json there")
    assert like(run.data(found), "fail", "no manifest.json there")
    # Steps 50 to 200 for ever, two, and the one that is being written: 7 x 12 MiB.
    room = SimpleNamespace(free=7 * 12 << 20)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: room)
    assert like(run.checkpoints(found), "pass", "about 0.082 GiB: 7 of 1.05 M parameters")
    room.free -= 1
    assert like(run.checkpoints(found), "fail", "0.1 GiB free")
    many = ConfigError(["moe.top_k is 9; it must be less", "b", "c"])
    monkeypatch.setattr(run, "check", lambda *args, **options: (_ for _ in ()).throw(many))
    assert like(run.settings(found), "fail", "moe.top_k is 9; it must be less (and 2 more)")
    monkeypatch.setattr(run, "check", lambda *args, **options: None)
    assert like(run.settings(found), "pass", "possible with 1 ranks")


def test_data(situation: Make, tmp_path: Path) -> None:
    from distmoe.data.manifest import Manifest, Shard, Totals, make_split, write_manifest

    shard = Shard("train-0", 4, 1, 8, "")
    np.arange(4, dtype="<u2").tofile(tmp_path / "train-0.bin")
    np.array([0, 4], dtype="<u8").tofile(tmp_path / "train-0.idx")
    splits = {"train": make_split((shard,))}
    write_manifest(
        tmp_path,
        Manifest(1, "uint16", 8, "<eod>", 0, "", splits, (), Totals(4, 1, 9), {}),
    )
    found = situation(config=Config(data=DataConfig(path=str(tmp_path))))
    assert like(run.data(found), "pass", "4 tokens in 1 shards")
    (tmp_path / "train-0.bin").write_bytes(b"12")
    assert like(run.data(found), "fail", "train-0.bin is 2 bytes long")


@pytest.mark.parametrize(
    ("check", "here", "status", "words"),
    [
        ("torch", "2.13.0", "pass", "2.13.0; allowed >=2.11"),
        ("torch", "2.10.1+cu130", "fail", "2.10.1+cu130; allowed >=2.11"),
        ("torch", None, "fail", "not installed"),
        ("deepspeed", "0.19.8", "pass", "allowed ==0.19.8"),
        ("deepspeed", "0.20.0", "warn", "0.20.0; allowed ==0.19.8"),
        ("deepspeed", None, "skip", "pip install 'distmoe[deepspeed]'"),
        ("numpy", "2.0.0", "pass", "; tests ran with "),
    ],
)
def test_versions(
    situation: Make,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    here: str | None,
    status: str,
    words: str,
) -> None:
    def version(package: str) -> str:
        if here is None:
            raise versions.PackageNotFoundError(package)
        return here

    monkeypatch.setattr(versions, "version", version)
    assert like(versions.CHECKS[check](situation()), status, words)


def test_python(situation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert like(versions.python(situation()), "pass", "allowed >=3.11")
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.10.4")
    assert like(versions.python(situation()), "fail", "3.10.4; distmoe needs >=3.11")


def test_groups(situation: Make) -> None:
    clocks = [["a", 100.0], ["b", 100.05]]
    good = Answers(gloo={"ranks": 2, "seconds": 0.5, "clocks": clocks})
    two = RankInfo(world=2, local_world=2, source="torchrun")
    assert like(
        communication.gloo(situation(probes=good)),
        "pass",
        "2 ranks met and added up ones in 500.0 ms",
    )
    assert like(communication.gloo(situation()), "fail", "no answer in 11 s")
    assert like(communication.wall_clocks(situation()), "skip", "one rank")
    together = situation(probes=good, ranks=two)
    assert like(communication.wall_clocks(together), "pass", "at most 50.0 ms apart, 2 ranks")
    clocks[0][1] = 99.0
    seen = "at most 1,050.0 ms apart: a is behind b"
    assert like(communication.wall_clocks(together), "warn", seen)
    assert like(communication.wall_clocks(situation(ranks=two)), "skip", "do not meet")
    assert like(communication.nccl(situation()), "skip", "no GPU here")
    assert like(communication.nccl(situation(probes=torch_with(DEVICE))), "fail", "no answer")
    without = torch_with(DEVICE, nccl=None)
    assert like(communication.nccl(situation(probes=without)), "fail", "without NCCL")
    with_nccl = torch_with(DEVICE)
    with_nccl.answers["nccl"] = {"seconds": 1.0}
    assert like(communication.nccl(situation(probes=with_nccl)), "pass", "2.28.9; 1 rank added")


def test_srun_and_mpiexec(situation: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    told = SimpleNamespace(stdout="", stderr="", returncode=0)
    monkeypatch.setattr(communication.subprocess, "run", lambda *args, **options: told)
    monkeypatch.setattr(communication.shutil, "which", lambda name, path=None: f"/usr/bin/{name}")
    told.stderr = "srun: MPI types are...\nsrun: none\nsrun: pmi2\n"
    assert like(communication.srun_plugins(situation()), "pass", "srun --mpi= pmi2")
    told.stderr = "MPI plugin types are...\n\tnone\n"
    assert like(communication.srun_plugins(situation()), "warn", "none of pmix, pmi2")
    library = Finding("pass", "loads MPICH Version: 5.0.2")
    monkeypatch.setattr(communication, "mpi4py", lambda situation: library)
    told.returncode, told.stderr = 1, "srun: error: no DNS\nsrun: fatal: no configuration\n"
    assert like(communication.srun_plugins(situation()), "skip", "tell: srun: fatal: no config")
    told.stdout = "HYDRA build details:"
    assert like(communication.mpiexec(situation()), "pass", "/usr/bin/mpiexec, MPICH")
    told.stdout = "mpiexec (OpenRTE) 4.1.4"
    assert like(communication.mpiexec(situation()), "fail", "/usr/bin/mpiexec is of Open MPI")
    monkeypatch.setattr(communication.shutil, "which", lambda name, path=None: None)
    assert like(communication.mpiexec(situation()), "skip", "there is no mpiexec")
    assert like(communication.srun_plugins(situation()), "skip", "there is no srun")


@pytest.mark.parametrize(
    ("printed", "status", "words"),
    [
        ('{"answer": {"library": "MPICH Version: 5.0.2", "ranks": 1}}', "pass", "loads MPICH"),
        ('{"answer": {"error": "ImportError: No module named \'mpi4py\'"}}', "skip", "installed"),
        ('{"answer": {"error": "RuntimeError: cannot load MPI"}}', "fail", "cannot load MPI"),
        ("", "fail", "MPI ended the process"),
    ],
)
def test_mpi4py(
    situation: Make, monkeypatch: pytest.MonkeyPatch, printed: str, status: str, words: str
) -> None:
    told = SimpleNamespace(stdout=printed)
    monkeypatch.setattr(communication.subprocess, "run", lambda *args, **options: told)
    assert like(communication.mpi4py(situation()), status, words)
