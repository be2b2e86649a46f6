"""`distmoe plan CONFIG --gpus N --hardware NAME|FILE`. Exit code: 2 for a wrong argument or a job
without a possible layout, 1 if none fits, else 0."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from distmoe.config import Config, ConfigError, load_config, resolve
from distmoe.config.overrides import named_keys
from distmoe.config.own_options import (
    file_option,
    integer_option,
    number_option,
    split_options,
)
from distmoe.config.ranges import out_of_range
from distmoe.planner.hardware import KNOWN, Hardware, find_hardware
from distmoe.planner.layouts import FREE, differing, obstacles
from distmoe.planner.plan_job import Plan, Planner
from distmoe.planner.plan_report import (
    DISPATCH,
    as_json,
    as_toml,
    options_of,
    print_plan,
    print_remedies,
)
from distmoe.planner.remedies import remedies

USAGE = f"""usage: distmoe plan CONFIG --gpus N --hardware {"|".join(KNOWN)}|FILE [options]

Predicts memory and time of every layout of a job, and ranks those that fit. Nothing is started.
FILE is a profile that `distmoe doctor comm --save` wrote; by default it is parallel.profile.

options:
  --gpus N              ranks of the job, one per GPU
  --skew X              pairs of a layer's busiest expert over the mean, as load_max_over_mean of a
                        run; 1: even experts (default 1.5)
  --top N               layouts that are shown (default 10)
  --ranks-per-node G    GPUs of a node (default: the machine's, at most N)
  --memory-gib X        memory of a GPU (default: the machine's)
  --json FILE           write every figure
  --write FILE          write a config that extends CONFIG by the best layout
  --parallel.ep 8       and any other setting of a run: it is not varied

examples:
  distmoe plan configs/models/sonicmoe_7b.toml --gpus 64 --hardware h100
  distmoe plan configs/eight_gpu.toml --gpus 8 --hardware h200 --model.vocab_size 50304
  distmoe plan configs/quickstart.toml --gpus 2 --hardware machine.toml --memory-gib 4
"""
OWN_OPTIONS = (
    "--gpus",
    "--hardware",
    "--skew",
    "--top",
    "--ranks-per-node",
    "--memory-gib",
    "--json",
    "--write",
)
WIDTH = 120
DEFAULT_SKEW = 1.5
"""Of experts under a load-balance loss; assumed."""


@dataclass(frozen=True)
class _Request:
    """What was asked for; None: not given. ``plain``: ``config`` without the given settings."""

    file: Path
    plain: Config
    config: Config
    settings: tuple[str, ...]
    world: int
    hardware: Hardware
    skew: float
    top: int
    json: Path | None
    write: Path | None


def main(argv: Sequence[str]) -> int:
    """Run `distmoe plan ARGV`; the exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return 0
    try:
        request = _request(argv)
        pinned = named_keys(request.settings)
        planner = Planner(request.config, request.world, request.hardware, skew=request.skew)
        plan = planner.plan(pinned=pinned, top=request.top)
        if not plan.tried:
            per_node = request.hardware.ranks_per_node
            raise ConfigError(
                obstacles(request.config, request.world, ranks_per_node=per_node, pinned=pinned)
            )
    except ConfigError as error:
        for problem in error.problems:
            print(f"distmoe plan: error: {problem}", file=sys.stderr)
        return 2
    width = None if sys.stdout.isatty() else WIDTH
    console = Console(width=width, highlight=False, markup=False, soft_wrap=True)
    _print_head(request, plan, console)
    print_plan(plan, request.hardware, console)
    if not plan.best:
        found = remedies(planner, pinned)
        print_remedies(found, request.config, request.hardware, console)
    else:
        _advise(request, plan, console)
    if request.json:
        figures = as_json(plan, request.hardware, world=request.world, skew=request.skew)
        request.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0 if plan.best else 1


def _print_head(request: _Request, plan: Plan, console: Console) -> None:
    hardware, train = request.hardware, request.config.train
    tokens = train.global_batch_size * request.config.data.seq_len
    rounding = request.config.moe.rounding
    factor, what = rounding.capacity_factor, rounding.capacity_of
    tiles = ", in whole tiles" if rounding.rule != "none" else ""
    kept = f", no {what} above {factor:g} times{tiles}" if factor else ""
    console.print(
        f"{request.file.name} on {request.world} x {hardware.name}, {hardware.ranks_per_node} on a "
        f"node; {tokens:,} tokens a step; busiest expert {request.skew:g} times the mean"
        f"{kept}"
    )
    if (cp := request.config.parallel.cp) > 1:
        console.print(f"Sequences are shared by {cp} ranks (parallel.cp)")
    source = hardware.profile.origin.note or "a measured profile"
    console.print(
        f"{plan.fitting} of {plan.tried} layouts fit. Predictions, not measurements; {source}"
    )
    for line in _left_out(request.config, plan):
        console.print(line)
    console.print()


def _left_out(config: Config, plan: Plan) -> Iterator[str]:
    """What was asked for and is not in the figures."""
    if config.train.compile != "none":
        yield "train.compile is predicted as none"
    shown = [*plan.best, *(misfit.layout for misfit in plan.misfits)]
    engines = {layout.config.parallel.engine for layout in shown}
    offload = (config.deepspeed.offload_optimizer, config.deepspeed.offload_parameters)
    if "deepspeed" in engines and offload != ("none", "none"):
        yield "time without offload: transfers and the CPU's optimizer are not predicted"


def _advise(request: _Request, plan: Plan, console: Console) -> None:
    """How to train with the best layout."""
    best, world, per_node = plan.best[0], request.world, request.hardware.ranks_per_node
    options = [*request.settings, *options_of(best, request.config)]
    # Without a launcher `distmoe train` starts the ranks itself.
    starts = {"launch.nproc": world} if world == per_node != request.config.launch.nproc else {}
    options += [word for key, value in starts.items() for word in (f"--{key}", str(value))]
    by = "" if world == per_node else " under SLURM (docs/launch.md has other launchers)"
    console.print(f"\nTrain with it{by}:\n  {_command(request.file, world, per_node, options)}")
    if request.write:
        keys = (*FREE, *DISPATCH, *named_keys(request.settings))
        changes = differing(request.plain, best.config, keys) | starts
        request.write.write_text(as_toml(changes, file=request.file, written_to=request.write))
        console.print(f"or\n  {_command(request.write, world, per_node, ())}")


def _command(file: Path, world: int, per_node: int, options: Sequence[str]) -> str:
    """It starts ``world`` ranks with ``file``."""
    if world == per_node:
        return shlex.join(["distmoe", "train", str(file), *options])
    ranks = ["--nodes", str(world // per_node), "--ranks-per-node", str(per_node)]
    return shlex.join(["distmoe", "launch", "slurm", str(file), *ranks, *options])


def _request(argv: Sequence[str]) -> _Request:
    """ConfigError names the first argument that is wrong."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError("the first argument must be a FILE such as configs/eight_gpu.toml")
    own, settings = split_options(argv[1:], OWN_OPTIONS)
    file = Path(argv[0])
    config = load_config(file, settings)
    world = integer_option(own, "--gpus", 0, least=1)
    if not world:
        raise ConfigError("--gpus is missing; it must be an integer, at least 1")
    given = own.get("--hardware", config.parallel.profile)
    if not given:
        raise ConfigError(f"--hardware is missing; it must be one of {', '.join(KNOWN)} or a FILE")
    hardware = find_hardware(
        given,
        memory_gib=number_option(own, "--memory-gib", 0.0, least=0.0),
        ranks_per_node=integer_option(own, "--ranks-per-node", 0, least=1),
    )
    _check_sizes(config, world)
    _check_machine(config, world, hardware, given)
    return _Request(
        file=file,
        plain=load_config(file),
        config=config,
        settings=tuple(settings),
        world=world,
        hardware=replace(hardware, ranks_per_node=min(hardware.ranks_per_node, world)),
        skew=number_option(own, "--skew", DEFAULT_SKEW, least=1.0),
        top=integer_option(own, "--top", 10, least=1),
        json=file_option(own, "--json"),
        write=file_option(own, "--write"),
    )


def _check_sizes(config: Config, world: int) -> None:
    """What no layout can mend."""
    problems = [problem for _, problem in out_of_range(config)]
    if not resolve(config, world).model.vocab_size:
        problems.append(
            f"model.vocab_size is 0, and data.path is '{config.data.path}', where no data was "
            "prepared; one of them must say how many tokens there are"
        )
    if problems:
        raise ConfigError(problems)


def _check_machine(config: Config, world: int, hardware: Hardware, given: str) -> None:
    """``given``: what the user called the hardware."""
    per_node = min(hardware.ranks_per_node, world)
    if world % per_node:
        raise ConfigError(
            f"--gpus is {world}; it must be a multiple of {per_node}, the GPUs of a node"
        )
    # The peaks that are known are those of GPUs.
    if config.run.device == "cpu" and hardware.peak_flops is not None:
        raise ConfigError(
            f"run.device is cpu, and --hardware is a GPU, {hardware.name}; give --run.device cuda"
        )
    if missing := hardware.missing_link(world):
        where = {"node": "as ranks of one node", "remote": "over several nodes"}[missing]
        raise ConfigError(
            f"profile '{given}' has no link '{missing}', which {world} GPUs, {per_node} on a node, "
            f"need; run `distmoe doctor comm --save` {where}, or add [links.{missing}]"
        )
