import os

import pytest

from distmoe.config import ConfigError, RankInfo
from distmoe.launch.env import (
    ALLOCATOR,
    _first_node,
    export_local_rank,
    let_segments_grow,
    rank_info,
    worker_environment,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "123",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
MPICH = {
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SRUN_PMI = {"PMI_RANK": "5", "PMI_SIZE": "7"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "123", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
PORT = 20000 + 123 * 7

CASES = {
    "nothing": ({}, RankInfo()),
    "torchrun": (TORCHRUN, RankInfo(3, 4, 1, 2, "10.0.0.1", 29500, "torchrun")),
    "local": (
        TORCHRUN | {"DISTMOE_LAUNCHER": "local"},
        RankInfo(3, 4, 1, 2, "10.0.0.1", 29500, "local"),
    ),
    "deepspeed": (DEEPSPEED, RankInfo(3, 4, 1, 2, "10.0.0.1", 29500, "deepspeed")),
    "torchrun in deepspeed": (
        DEEPSPEED | TORCHRUN,
        RankInfo(3, 4, 1, 2, "10.0.0.1", 29500, "torchrun"),
    ),
    "srun": (SLURM, RankInfo(5, 7, 1, 3, "10.0.0.2", PORT, "slurm")),
    "srun, restarted": (
        SLURM | {"SLURM_RESTART_COUNT": "2"},
        RankInfo(5, 7, 1, 3, "10.0.0.2", PORT + 2, "slurm"),
    ),
    "srun, address given": (
        SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "77"},
        RankInfo(5, 7, 1, 3, "head", 77, "slurm"),
    ),
    "srun, repeated counts": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1"},
        RankInfo(5, 7, 1, 3, "10.0.0.2", PORT, "slurm"),
    ),
    "torchrun in srun": (SLURM | TORCHRUN, RankInfo(3, 4, 1, 2, "10.0.0.1", 29500, "torchrun")),
    "srun with a list of nodes": (
        SLURM | {"SLURM_STEP_NODELIST": "127.0.0.[3-9]"},
        RankInfo(5, 7, 1, 3, "127.0.0.3", PORT, "slurm"),
    ),
    "srun, names that do not resolve": (
        SLURM | {"SLURM_STEP_NODELIST": "no..node"},
        RankInfo(5, 7, 1, 3, "10.0.0.2", PORT, "slurm"),
    ),
    "srun with MPI": (SLURM | SRUN_PMI, RankInfo(5, 7, 1, 3, "10.0.0.2", PORT, "slurm")),
    "mpirun in a job": (SLURM | MPICH, RankInfo(1, 2, 0, 1, "a", 1, "mpi")),
    "batch script": (BATCH_SCRIPT, RankInfo()),
    "srun of one task": (SLURM | {"SLURM_NTASKS": "1"}, RankInfo()),
    "shell of salloc": (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, RankInfo()),
    "Open MPI": (OPEN_MPI, RankInfo(1, 2, 1, 2, "a", 1, "mpi")),
    "MPICH": (MPICH, RankInfo(1, 2, 0, 1, "a", 1, "mpi")),
    "mpirun of one": (MPICH | {"PMI_RANK": "0", "PMI_SIZE": "1"}, RankInfo()),
}


@pytest.mark.parametrize(("environ", "expected"), CASES.values(), ids=CASES)
def test_place_of_a_rank(environ: dict[str, str], expected: RankInfo) -> None:
    assert rank_info(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK is 'x'; it must be an integer"),
        (TORCHRUN | {"RANK": "4"}, "rank is 4 of 4 in the environment of torchrun"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "local rank is 2 of 2"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is 0; it must be in 1..65535"),
        (DEEPSPEED | {"LOCAL_RANK": "2"}, "local rank is 2 of 2 in the environment of deepspeed"),
        ({"RANK": "0"}, "WORLD_SIZE is not set; the launcher sets it for every rank"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,x"}, "SLURM_STEP_TASKS_PER_NODE is '4,x'"),
        (SLURM | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is not set"),
        (SLURM | {"SLURM_LAUNCH_NODE_IPADDR": ""}, "SLURM_LAUNCH_NODE_IPADDR is not set"),
        (OPEN_MPI | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        (SRUN_PMI, "MPI_LOCALRANKID is not set"),
        (MPICH | {"PMI_SIZE": "two"}, "PMI_SIZE is 'two'; it must be an integer"),
    ],
)
def test_malformed_environment(environ: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rank_info(environ)
    (problem,) = caught.value.problems
    assert problem.startswith(expected)


def test_a_job_port_is_no_privileged_and_no_impossible_one() -> None:
    for job in (1, 2857, 2858, 10**9):
        ranks = rank_info(SLURM | {"SLURM_JOB_ID": str(job)})
        assert 20000 <= ranks.master_port < 40000


def test_a_worker_reads_its_place_back() -> None:
    place = RankInfo(1, 3, 1, 3, "127.0.0.1", 4242, "local")
    environ = worker_environment(place, threads=5)
    assert rank_info(environ) == place
    assert (environ["OMP_NUM_THREADS"], environ["PYTHONSAFEPATH"]) == ("5", "1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("rack[1,7]-ib", "rack1-ib"),
        ("", ""),
    ],
)
def test_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert _first_node(nodes) == first


def test_every_launcher_ends_in_the_local_rank_that_deepspeed_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "7")
    export_local_rank(rank_info(SLURM))
    assert os.environ["LOCAL_RANK"] == "1"


@pytest.mark.parametrize("own", ALLOCATOR)
def test_memory_grows_unless_the_user_has_set_the_allocator(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALLOCATOR:
        # What the test sets is gone after it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv(own, "max_split_size_mb:64")
    let_segments_grow()
    assert {name: os.environ.get(name) for name in ALLOCATOR if name != own} == {
        name: None for name in ALLOCATOR if name != own
    }
    monkeypatch.delenv(own)
    let_segments_grow()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
