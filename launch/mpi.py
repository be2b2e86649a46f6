"""`distmoe launch mpi`: all ranks by mpiexec. Rank 0 tells the others its address, by MPI."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from distmoe.config import ConfigError
from distmoe.launch.job import PYTHON, Job, Start

OPTIONS = ("--hostfile",)
HELP = """  --hostfile FILE       the nodes, as mpiexec reads them (in a SLURM job it knows them)
"""


def prepare(job: Job) -> Start:
    """The command of all ranks, in the words of the mpiexec that is here."""
    mpiexec = _mpiexec()
    hosts = job.options.get("--hostfile")
    if hosts is not None and not Path(hosts).is_file():
        raise ConfigError(f"--hostfile is '{hosts}'; there is no such file")
    command = (
        *(mpiexec, "-n", str(job.world), *_per_node(mpiexec, job.ranks_per_node)),
        *(("--hostfile", hosts) if hosts is not None else ()),
        *job.launcher_args,
        # Behind env, as not every mpiexec hands its own variables to other nodes.
        *(*job.environment(), PYTHON, "-m", *job.train_command()),
    )
    return Start(command)


def _mpiexec() -> str:
    """That of this Python's environment, whose library mpi4py finds, too; else the machine's."""
    beside = shutil.which("mpiexec", path=str(Path(PYTHON).parent))
    found = beside or shutil.which("mpiexec")
    if found is None:
        raise ConfigError("there is no mpiexec here; pip install mpich, or load a module with MPI")
    return found


def _per_node(mpiexec: str, ranks: int) -> tuple[str, ...]:
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" in version or "OpenRTE" in version:
        return ("--map-by", f"ppr:{ranks}:node")
    return ("-ppn", str(ranks))
