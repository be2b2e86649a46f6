"""`distmoe doctor comm`: what the links and devices of a job can do, as a table and a profile."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distmoe.config import Config, ConfigError, RankInfo, apply_overrides, load_config, resolve
from distmoe.config.own_options import file_option, integer_option, split_options
from distmoe.config.ranges import out_of_range
from distmoe.launch.env import rank_info
from distmoe.launch.local import run_local
from distmoe.launch.worker import print_problems, run_rank

if TYPE_CHECKING:
    from distmoe.planner.measure_machine import MachineFigures

COMMAND = "doctor comm"
USAGE = """usage: distmoe doctor comm [FILE] [options]

Measures links, the small all-gather and the expert products, as all ranks of the job: under
torchrun, srun or mpiexec, or by ranks that it starts itself. FILE is a run's TOML file.

options:
  --nproc N             ranks to start on this machine, if no launcher did (default launch.nproc)
  --ranks-per-node G    consecutive ranks that count as one node (default: as the launcher says)
  --save PROFILE        write the profile that parallel.profile reads
  --json FILE           write every figure
  --moe.num_experts 64  and any other setting of a run
"""
OWN_OPTIONS = ("--nproc", "--ranks-per-node", "--save", "--json")


@dataclass(frozen=True)
class _Request:
    """What was asked for; 0 and None: not given."""

    config: Config
    nproc: int
    ranks_per_node: int
    save: Path | None
    json: Path | None


def main(argv: Sequence[str]) -> int:
    """Run `distmoe doctor ARGV`, ARGV[0] is comm; the exit code: 2 for a wrong argument, 1 for a
    failure, else 0."""
    first = True
    try:
        if "--help" in argv or "-h" in argv:
            print(USAGE, end="")
            return 0
        ranks = rank_info()
        first = ranks.rank == 0
        request = _parse(argv)
        starts_ranks = ranks.source == "single" and request.nproc > 1
        world = request.nproc if starts_ranks else ranks.world
        ranks_per_node = request.ranks_per_node or (world if starts_ranks else ranks.local_world)
        _check(request.config, world, ranks_per_node)
    except ConfigError as error:
        # The other ranks have the same to say.
        if first:
            print_problems(COMMAND, error)
        return 2
    if starts_ranks:
        command = [sys.executable, "-m", "distmoe.launch.cli", "doctor", *argv]
        return run_local(command, world, threads=request.config.launch.threads)
    return run_rank(COMMAND, ranks, lambda: _measure(request, ranks, ranks_per_node))


def _parse(argv: Sequence[str]) -> _Request:
    rest = list(argv[1:])
    file = rest.pop(0) if rest and not rest[0].startswith("-") else None
    own, overrides = split_options(rest, OWN_OPTIONS)
    config = load_config(file, overrides) if file else apply_overrides(Config(), overrides)
    return _Request(
        config=config,
        nproc=integer_option(own, "--nproc", config.launch.nproc, least=1),
        ranks_per_node=integer_option(own, "--ranks-per-node", 0, least=1),
        save=file_option(own, "--save"),
        json=file_option(own, "--json"),
    )


def _check(config: Config, world: int, ranks_per_node: int) -> None:
    """The settings that are used here: a machine is measured before there is data, say."""
    problems = [problem for _, problem in out_of_range(config)]
    if world % ranks_per_node:
        problems.append(
            f"--ranks-per-node is {ranks_per_node}; it must divide the number of ranks ({world})"
        )
    if config.moe.dispatch.exchange in ("local", "threaded") and world > 1:
        problems.append(
            f"moe.dispatch.exchange is {config.moe.dispatch.exchange}; it must be auto, p2p or "
            f"all_to_all for {world} ranks"
        )
    if problems:
        raise ConfigError(problems)


def _measure(request: _Request, ranks: RankInfo, ranks_per_node: int) -> int:
    """One rank's part; rank 0 prints and writes."""
    from distmoe.planner.machine_profile import save_profile
    from distmoe.planner.measure_machine import measure_machine
    from distmoe.runtime import start, stop

    config = resolve(request.config, ranks.world)
    runtime = start(
        ranks,
        device=config.run.device,
        timeout_s=config.launch.timeout_s,
        threads=config.launch.threads,
        engine="single",
    )
    figures = measure_machine(config, runtime, ranks_per_node=ranks_per_node)
    if ranks.rank == 0:
        _print_table(figures)
        if request.json:
            request.json.write_text(json.dumps(asdict(figures), indent=1) + "\n")
        if request.save:
            save_profile(figures.profile(), request.save)
            print(f"profile in {request.save}; a run reads it with --parallel.profile")
    stop(runtime)
    return 0


def _print_table(figures: MachineFigures) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("ranks", justify="right")
    table.add_column("class")
    for head in ("alpha us", "beta MB/s", "one pair MB/s"):
        table.add_column(head, justify="right")
    table.add_column("worst pair")
    own = figures.own
    table.add_row("1", "own", f"{1e6 * own.latency_s:,.1f}", f"{own.bytes_per_s / 1e6:,.1f}")
    for link in figures.links:
        source, target, rate = link.worst
        table.add_row(
            str(figures.ranks),
            link.name,
            f"{1e6 * link.fit.latency_s:,.1f}",
            f"{link.fit.bytes_per_s / 1e6:,.1f}",
            f"{link.alone.bytes_per_s / 1e6:,.1f}",
            f"{source} -> {target} {rate / 1e6:,.1f} MB/s",
        )
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    console.print(table)
    for name, text in _facts(figures):
        console.print(f"{name:<15} {text}")


def _facts(figures: MachineFigures) -> list[tuple[str, str]]:
    rates = sorted(figures.gemm_flops)
    slowest = figures.gemm_flops.index(rates[0])
    all_ranks = f"{figures.ranks} ranks, {figures.ranks_per_node} on a node, {figures.exchange}"
    gather = f"{1e6 * figures.all_gather_s:,.1f} us, {figures.all_gather_bytes} bytes of each rank"
    return [
        ("ranks", all_ranks if figures.links else "1: there are no links to measure"),
        *([("all-gather", gather)] if figures.links else []),
        ("launch", f"{1e6 * figures.launch_s:,.1f} us for the expert kernels of a block"),
        (
            "expert products",
            f"{rates[len(rates) // 2] / 1e9:,.1f} GFLOP/s, {figures.kernel} kernels in "
            f"{figures.dtype}; slowest: rank {slowest} with {rates[0] / 1e9:,.1f}",
        ),
        (
            "blocks",
            f"{figures.dense_flops / 1e9:,.1f} GFLOP/s of products, "
            f"{figures.attention_flops / 1e9:,.1f} of attention",
        ),
        ("device", str(figures.where["device"])),
    ]
