"""`distmoe doctor`: examine this machine, and the run of a file."""

from __future__ import annotations

import io
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from rich.console import Console

from distmoe.config import Config, ConfigError, RankInfo, load_config
from distmoe.config.own_options import file_option, integer_option, split_options
from distmoe.launch.doctor import comm
from distmoe.launch.doctor.communication import nccl
from distmoe.launch.doctor.examine import Result, examine
from distmoe.launch.doctor.finding import Finding, Status
from distmoe.launch.doctor.probes import COMMAND, ProbeProcess
from distmoe.launch.doctor.situation import Situation
from distmoe.launch.doctor.table import THEMES
from distmoe.launch.env import lone_environment, rank_info, variables, worker_environment
from distmoe.launch.worker import print_problems
from distmoe.metrics.nvml import all_gpus

SECONDS = 12.0
"""For all checks together."""
PROBE_SECONDS = 11.0
TOLD_SECONDS = 13.0
"""By then all ranks have told what they found."""
# Of the names of checks.
WIDTH = 20
OWN_OPTIONS = ("--world", "--ranks-per-node", "--json")
STYLES = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIP: "dim"}

USAGE = """usage: distmoe doctor [FILE] [options]
       distmoe doctor comm [FILE] [options]      measures links and devices: --help there

Checks versions, devices, processors, communication, network, launcher, variables, limits and
disks, and with FILE, a run's TOML file, that the run fits them: pass, warn or fail, what was seen,
and what to do; skip and why, where a check cannot be made. Nothing is changed, and it takes 15 s at
most. Under torchrun, srun or mpiexec the first rank of every machine examines it.

options:
  --world N             ranks of the run (default: as the launcher says, else launch.nproc)
  --ranks-per-node G    of them on this machine (default: as the launcher says, else all)
  --json FILE           write what was found, on the machine of rank 0
  --launch.nproc 2      and any other setting of FILE

Ends with 1 if a check has failed, 2 for a wrong argument, else 0.
"""


@dataclass(frozen=True)
class _Request:
    """What was asked for; None and 0: not given. ``run``: FILE and settings."""

    run: tuple[str, ...]
    config: Config | None
    world: int
    ranks_per_node: int
    json: Path | None


def main(argv: Sequence[str]) -> int:
    """Run `distmoe doctor ARGV`; the exit code."""
    if argv and argv[0] == "comm":
        return comm.main(argv)
    if "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return 0
    try:
        request = _parse(argv)
    except ConfigError as error:
        print_problems("doctor", error)
        return 2
    began = time.perf_counter()
    situation, probes = _situation(request)
    try:
        if situation.ranks.local_rank > 0:
            probes.wait()
            code = _tell_gpu(situation)
        else:
            code = _tell(situation, request, began)
        if code and situation.ranks.world > 1:
            # Launchers end all ranks when one has failed.
            sys.stdout.flush()
            time.sleep(max(0.0, began + TOLD_SECONDS - time.perf_counter()))
        return code
    finally:
        probes.kill()


def _parse(argv: Sequence[str]) -> _Request:
    rest = list(argv)
    file = rest.pop(0) if rest and not rest[0].startswith("-") else None
    own, settings = split_options(rest, OWN_OPTIONS)
    if settings and file is None:
        raise ConfigError(f"'{settings[0]}' is no option without FILE, the TOML file of a run")
    return _Request(
        run=(file, *settings) if file else (),
        config=load_config(file, settings) if file else None,
        world=integer_option(own, "--world", 0, least=1),
        ranks_per_node=integer_option(own, "--ranks-per-node", 0, least=1),
        json=file_option(own, "--json"),
    )


def _situation(request: _Request) -> tuple[Situation, ProbeProcess]:
    """What there is to examine, and the process that has begun to probe it."""
    try:
        ranks, problem = rank_info(), ""
    except ConfigError as error:
        ranks, problem = RankInfo(), str(error)
    launched = ranks.source != "single"
    nproc = request.config.launch.nproc if request.config else 1
    world = request.world or (ranks.world if launched else nproc)
    local_world = request.ranks_per_node or (ranks.local_world if launched else world)
    environment = worker_environment(ranks, threads=1) if launched else lone_environment()
    probes = ProbeProcess((*COMMAND, *request.run), environment, seconds=PROBE_SECONDS)
    situation = Situation(
        config=request.config,
        world=world,
        local_world=local_world,
        ranks=ranks,
        launcher_problem=problem,
        variables=variables(),
        probes=probes,
        gpus=cache(all_gpus),
    )
    return situation, probes


def _tell(situation: Situation, request: _Request, began: float) -> int:
    results: list[Result] = []
    several = situation.ranks.world > situation.ranks.local_world
    # Machines that print at the same time print each in one piece.
    piece = io.StringIO() if several else None
    console = Console(highlight=False, markup=False, soft_wrap=True, file=piece)
    machine = f" of {socket.gethostname()}" if several else ""
    for theme, of_theme in groupby(
        examine(situation, THEMES, seconds=SECONDS), key=lambda result: result.theme
    ):
        console.print(f"{theme}{machine}", style="bold")
        for finding, alike in groupby(of_theme, key=lambda result: result.finding):
            found = list(alike)
            _print(console, ", ".join(result.check for result in found), finding)
            results += found
    counts = Counter(result.finding.status for result in results)
    seconds = time.perf_counter() - began
    numbers = ", ".join(f"{counts[status]} {status}" for status in Status)
    console.print(f"{numbers}; {seconds:.1f} s", style="bold")
    if piece is not None:
        sys.stdout.write(piece.getvalue())
    if request.json is not None and situation.ranks.rank == 0:
        request.json.write_text(as_json(results, seconds=seconds))
    return 1 if counts[Status.FAIL] else 0


def _tell_gpu(situation: Situation) -> int:
    """The first rank of the machine speaks for it; the others are there to be met, and have a GPU
    that only they try."""
    finding = nccl(situation)
    if finding.status is not Status.FAIL:
        return 0
    place = f"local rank {situation.ranks.local_rank} of {socket.gethostname()}"
    print(f"{finding.status}  nccl, {place}  {finding.seen} -> {finding.fix}")
    return 1


def _print(console: Console, checks: str, finding: Finding) -> None:
    """Neighbours that say the same are one line."""
    console.print(f"  {finding.status}", style=STYLES[finding.status], end="")
    console.print(f"  {checks:<{WIDTH}}  {finding.seen}")
    if finding.fix:
        console.print(f"{'':<8}{'':<{WIDTH}}  -> {finding.fix}", style="bold")


def as_json(results: Iterable[Result], *, seconds: float) -> str:
    """Of this machine: its name, and a list of theme, check, status, seen and fix."""
    checks = [{"theme": r.theme, "check": r.check, **asdict(r.finding)} for r in results]
    report = {"host": socket.gethostname(), "seconds": seconds, "checks": checks}
    return json.dumps(report, indent=1) + "\n"
