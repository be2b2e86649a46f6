"""`distmoe launch`: check a run, then start it by torchrun, SLURM, MPI or DeepSpeed's launcher."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from types import ModuleType

from distmoe.config import Config, ConfigError, check, load_config, resolve
from distmoe.config.keys import nearest
from distmoe.config.own_options import integer_option, split_options
from distmoe.launch import deepspeed, mpi, slurm, torchrun
from distmoe.launch.job import Job
from distmoe.launch.worker import print_problems

LAUNCHERS: dict[str, ModuleType] = {
    "torchrun": torchrun,
    "slurm": slurm,
    "mpi": mpi,
    "deepspeed": deepspeed,
}
"""Name -> OPTIONS and HELP of a launcher, and prepare(job), what it starts."""

USAGE = """usage: distmoe launch LAUNCHER CONFIG [options] [settings of the run]

Checks a run of all its ranks, then starts it. LAUNCHER is torchrun, slurm, mpi or deepspeed.

options:
  --nodes N             machines (default 1)
  --ranks-per-node G    ranks on each, one per GPU (default launch.nproc)
  --dry-run             print files and commands, and start nothing
  --resume auto|never|FOLDER
  --launcher-args ARGS  options for torchrun, sbatch, mpiexec or deepspeed, in one word
  --elastic             torchrun, slurm: go on after a node is lost, with fewer if that is possible
  --min-nodes M         with --elastic: wait until so many are here (default: the fewest possible)
"""
SWITCHES = ("--dry-run", "--elastic")
COMMON = ("--nodes", "--ranks-per-node", "--resume", "--launcher-args", "--min-nodes")
ELASTIC = ("torchrun", "slurm")


def main(argv: Sequence[str]) -> int:
    """Run `distmoe launch ARGV`, and become the launcher; 2 for a wrong argument or config."""
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        for name, launcher in LAUNCHERS.items():
            print(f"\nof {name}:\n{launcher.HELP}", end="")
        return 0
    try:
        launcher = _launcher(argv[0])
        job = _job(argv[0], argv[1:])
        start = launcher.prepare(job)
        if "--dry-run" in job.options:
            print(start.show())
            return 0
        if start.other_nodes:
            raise ConfigError(
                f"--node-rank is not given; it must be in 0..{job.nodes - 1}, another on every node"
            )
        if shutil.which(start.command[0]) is None:
            raise ConfigError(f"there is no {start.command[0]} here; --dry-run needs none")
    except ConfigError as error:
        print_problems("launch", error)
        return 2
    for path, text in start.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for note in start.notes:
        print(note, flush=True)
    # Signals then reach the launcher itself.
    os.execvp(start.command[0], start.command)


def _launcher(name: str) -> ModuleType:
    if name not in LAUNCHERS:
        near = nearest(name, LAUNCHERS)
        advice = f"; did you mean {near}?" if near else ""
        raise ConfigError(f"LAUNCHER is '{name}'; it must be one of {', '.join(LAUNCHERS)}{advice}")
    return LAUNCHERS[name]


def _job(launcher: str, argv: Sequence[str]) -> Job:
    """The job that the arguments describe; ConfigError if it is impossible."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError("the second argument must be a FILE such as configs/quickstart.toml")
    file, *rest = argv
    options, settings = split_options(
        rest, (*COMMON, *LAUNCHERS[launcher].OPTIONS), switches=SWITCHES
    )
    if "--resume" in options:
        settings += ["--checkpoint.resume", options["--resume"]]
    config = load_config(file, settings)
    nodes = integer_option(options, "--nodes", 1, least=1)
    ranks = integer_option(options, "--ranks-per-node", config.launch.nproc, least=1)
    check(config, nodes * ranks, local_world=ranks)
    elastic = "--elastic" in options
    if elastic and launcher not in ELASTIC:
        raise ConfigError(f"--elastic is for {' and '.join(ELASTIC)}, not for {launcher}")
    if "--min-nodes" in options and not elastic:
        raise ConfigError("--min-nodes needs --elastic")
    return Job(
        config=resolve(config, nodes * ranks, local_world=ranks),
        arguments=(file, *settings),
        nodes=nodes,
        ranks_per_node=ranks,
        min_nodes=_min_nodes(config, nodes, ranks, options) if elastic else None,
        options=options,
        launcher_args=tuple(shlex.split(options.get("--launcher-args", ""))),
        threads=config.launch.threads or max(1, len(os.sched_getaffinity(0)) // ranks),
    )


def _min_nodes(config: Config, nodes: int, ranks: int, options: dict[str, str]) -> int:
    """--min-nodes, or the fewest so that the run is possible on every number from there to
    ``nodes``; ConfigError if it is impossible on a number in between."""
    wanted = integer_option(options, "--min-nodes", 1, least=1)
    if wanted > nodes:
        raise ConfigError(f"--min-nodes is {wanted}; it must be at most --nodes ({nodes})")
    for number in range(nodes - 1, wanted - 1, -1):
        try:
            check(config, number * ranks, local_world=ranks)
        except ConfigError as error:
            if "--min-nodes" not in options:
                return number + 1
            problem = error.problems[0]
            raise ConfigError(
                f"--min-nodes is {wanted}; {number} nodes are impossible: {problem}"
            ) from error
    return wanted
