"""Cores, threads, memory, and the limits of cgroups and shells."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_doctor import like

from distmoe.config import Config, LaunchConfig
from distmoe.launch.doctor import cgroup, limits, processors
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]


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
    # The least limit on the way up counts.
    (own_cgroup / "job/step/cpu.max").write_text("800000 100000\n")
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
    (own_cgroup / "own").write_text("3:memory:/\n")
    (own_cgroup / "memory").mkdir()
    (own_cgroup / "memory/memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert "cgroup" not in processors.memory(situation()).seen
    (own_cgroup / "own").write_text("0::/job/step\n")
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
