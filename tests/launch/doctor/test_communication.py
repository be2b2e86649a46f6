"""Libraries between ranks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
from launch_doctor import DEVICE, Answers, like, torch_with

from distmoe.config import RankInfo
from distmoe.launch.doctor import communication
from distmoe.launch.doctor.finding import Finding
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]


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
