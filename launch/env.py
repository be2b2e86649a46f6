"""Which rank this process is: the one file that reads the environment.

The first of these that is there counts: torchrun (or `distmoe train` itself, or the deepspeed
launcher), mpirun, SLURM's srun.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from distmoe.config import ConfigError, RankInfo
from distmoe.launch.mpi_address import rank_0_address

Environment = Mapping[str, str]

LAUNCHER = "DISTMOE_LAUNCHER"
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
OF_LAUNCHERS = (*OF_TORCHRUN, "SLURM_", "PMI", "OMPI_", "MPI_LOCAL", "HYDI_", "PALS_")
"""How names of variables begin that launchers set for their ranks."""
FIRST_JOB_PORT = 20000
JOB_PORTS = 20000
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of the settings of torch's allocator for GPUs, the newest first."""


def rank_info(environ: Environment | None = None) -> RankInfo:
    """The place of this process, from ``environ`` (os.environ by default).

    ConfigError, one line, for a variable that is missing or makes no sense.
    """
    variables = os.environ if environ is None else environ
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return _checked(_torchrun(variables))
    # Before SLURM: inside a job mpirun starts by srun, whose variables its ranks inherit.
    for names in (OPEN_MPI, MPICH):
        if names.local_rank in variables:
            return _checked(_mpi(variables, names))
    if _is_slurm_step(variables):
        return _checked(_slurm(variables))
    if MPICH.rank in variables:
        return _checked(_mpi(variables, MPICH))
    return RankInfo()


def worker_environment(ranks: RankInfo, *, threads: int) -> dict[str, str]:
    """The environment of a worker that `distmoe train` starts: this one's, and its place."""
    return {
        **os.environ,
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world),
        "LOCAL_RANK": str(ranks.local_rank),
        "LOCAL_WORLD_SIZE": str(ranks.local_world),
        "MASTER_ADDR": ranks.master_addr,
        "MASTER_PORT": str(ranks.master_port),
        LAUNCHER: ranks.source,
        "OMP_NUM_THREADS": str(threads),
        # The working folder must not shadow installed packages.
        "PYTHONSAFEPATH": "1",
    }


def variables() -> dict[str, str]:
    """All of this process, for those who only look."""
    return dict(os.environ)


def lone_environment() -> dict[str, str]:
    """The environment of a process that is no rank: this one's, without what launchers add."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(OF_LAUNCHERS)}
    return {**own, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def export_local_rank(ranks: RankInfo) -> None:
    """For DeepSpeed, which reads it itself, whatever launcher there is."""
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)


def export_determinism() -> None:
    """For run.deterministic, what torch cannot set by itself; before the first product of a GPU,
    and before torch's compiler is imported. What the user has set stays.

    cuBLAS gets a workspace of a fixed size, without which its sums may depend on what else runs;
    the compiler picks no kernel by timing.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")


def hide_torch_warnings() -> None:
    """Unless the user has asked for another level; before torch is imported.

    A lost peer is an error in Python already; the libraries below would put a C++ stack before it.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def let_segments_grow() -> None:
    """Unless the user has set torch's allocator; before torch is imported.

    The rows of a layer are as many as routing makes them. In segments of a fixed size every other
    number leaves other holes, and a run is out of memory while much of it is reserved.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def _torchrun(variables: Environment) -> RankInfo:
    """The deepspeed launcher sets the same, but for the name of one variable."""
    by_deepspeed = "LOCAL_WORLD_SIZE" not in variables and "LOCAL_SIZE" in variables
    source = "deepspeed" if by_deepspeed else "torchrun"
    return RankInfo(
        rank=_integer(variables, "RANK"),
        world=_integer(variables, "WORLD_SIZE"),
        local_rank=_integer(variables, "LOCAL_RANK"),
        local_world=_integer(variables, "LOCAL_SIZE" if by_deepspeed else "LOCAL_WORLD_SIZE"),
        master_addr=_text(variables, "MASTER_ADDR"),
        master_port=_integer(variables, "MASTER_PORT"),
        source="local" if variables.get(LAUNCHER) == "local" else source,
    )


def _is_slurm_step(variables: Environment) -> bool:
    """A batch script and a shell of salloc have a job's variables too; they are one process."""
    return "SLURM_STEP_ID" in variables and _slurm_world(variables) > 1


def _slurm_world(variables: Environment) -> int:
    step = "SLURM_STEP_NUM_TASKS"
    return _integer(variables, step if step in variables else "SLURM_NTASKS", default=1)


def _slurm(variables: Environment) -> RankInfo:
    return RankInfo(
        rank=_integer(variables, "SLURM_PROCID"),
        world=_slurm_world(variables),
        local_rank=_integer(variables, "SLURM_LOCALID"),
        local_world=_slurm_local_world(variables),
        master_addr=_slurm_address(variables),
        master_port=_slurm_port(variables),
        source="slurm",
    )


def _slurm_address(variables: Environment) -> str:
    """MASTER_ADDR, else the step's first node, where rank 0 is, if its name is known here; else the
    node that called srun: in a batch job the same, under salloc perhaps the login node."""
    if "MASTER_ADDR" in variables:
        return _text(variables, "MASTER_ADDR")
    first = _first_node(variables.get("SLURM_STEP_NODELIST", ""))
    try:
        socket.getaddrinfo(first, None)
    except (OSError, UnicodeError):
        first = ""
    return first or _text(variables, "SLURM_LAUNCH_NODE_IPADDR")


def _first_node(nodes: str) -> str:
    """The first of a list such as `gpu[003-005,9],cpu1`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def _slurm_port(variables: Environment) -> int:
    """The same on all ranks, another one for another job or another try of a job."""
    if "MASTER_PORT" in variables:
        return _integer(variables, "MASTER_PORT")
    restart = _integer(variables, "SLURM_RESTART_COUNT", default=0)
    return FIRST_JOB_PORT + (_integer(variables, "SLURM_JOB_ID") * 7 + restart) % JOB_PORTS


def _slurm_local_world(variables: Environment) -> int:
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name in variables:
            tasks, node = (
                list(_tasks_per_node(variables, name)),
                _integer(variables, "SLURM_NODEID"),
            )
            # SLURM_NTASKS_PER_NODE is one number for all nodes.
            return tasks[node] if node < len(tasks) else tasks[-1]
    raise ConfigError("SLURM_STEP_TASKS_PER_NODE is not set; srun sets it for its tasks")


def _tasks_per_node(variables: Environment, name: str) -> Iterator[int]:
    """Tasks of each node of a list such as `4(x2),3`."""
    for run in variables[name].split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run.strip())
        if match is None:
            raise ConfigError(f"{name} is '{variables[name]}'; expected a list such as 4(x2),3")
        yield from [int(match[1])] * int(match[2] or 1)


class _MpiNames(NamedTuple):
    """The variables of an mpirun. Under srun there may be a rank and a size, and no local ones."""

    rank: str
    size: str
    local_rank: str
    local_size: str


OPEN_MPI = _MpiNames(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = _MpiNames("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _mpi(variables: Environment, names: _MpiNames) -> RankInfo:
    rank, world, local_rank, local_world = (_integer(variables, name) for name in names)
    if world == 1:
        return RankInfo()
    if "MASTER_ADDR" in variables:
        address, port = _text(variables, "MASTER_ADDR"), _integer(variables, "MASTER_PORT")
    else:
        address, port = rank_0_address(world, one_node=local_world == world)
    return RankInfo(
        rank=rank,
        world=world,
        local_rank=local_rank,
        local_world=local_world,
        master_addr=address,
        master_port=port,
        source="mpi",
    )


def _checked(ranks: RankInfo) -> RankInfo:
    for name, index, count in (
        ("rank", ranks.rank, ranks.world),
        ("local rank", ranks.local_rank, ranks.local_world),
    ):
        if not 0 <= index < count:
            raise ConfigError(
                f"{name} is {index} of {count} in the environment of {ranks.source}; "
                f"it must be in 0..{count - 1}"
            )
    if ranks.source != "single" and not 0 < ranks.master_port < 1 << 16:
        raise ConfigError(f"MASTER_PORT is {ranks.master_port}; it must be in 1..65535")
    return ranks


def _integer(variables: Environment, name: str, *, default: int | None = None) -> int:
    if default is not None and name not in variables:
        return default
    text = _text(variables, name)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is '{text}'; it must be an integer") from None


def _text(variables: Environment, name: str) -> str:
    if not variables.get(name):
        raise ConfigError(f"{name} is not set; the launcher sets it for every rank")
    return variables[name]
