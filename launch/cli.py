"""The command `distmoe`. Exit codes: 2 for a wrong argument or config, 1 for a failure, else 0."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from distmoe import __version__
from distmoe.config import Config, ConfigError, check, load_config, resolve, to_toml
from distmoe.config.dtype import with_dtype
from distmoe.config.keys import key_types, nearest, suggestion, value_of
from distmoe.config.overrides import print_options
from distmoe.config.own_options import integer_option, split_options
from distmoe.config.unused import unused_settings
from distmoe.launch.env import rank_info
from distmoe.launch.worker import before_torch, print_problems, run_worker

USAGE = """usage: distmoe COMMAND ...

Training of fine-grained mixture-of-experts language models.

commands:
  train FILE [--resume auto|never|FOLDER] [--debug] [options]
                    train as the TOML file says; options change its settings
  config FILE [--world N] [--deepspeed | --get KEY] [options]
                    check a run of N ranks (default launch.nproc) and print its settings,
                    the JSON that its engine gives DeepSpeed, or the value of one setting
  launch torchrun|slurm|mpi|deepspeed FILE --nodes N --ranks-per-node G [--dry-run] [options]
                    check a run of several machines, and start or submit it
  data prepare ...  tokenize text, JSONL, Parquet or Arrow
  data inspect DIR ... | FILE [--verify] [--json]
                    show prepared folders, or those of a run, and check them
  checkpoint inspect|verify|reshard|consolidate DIR
                    look at a checkpoint, check its hashes, export it
  plan FILE --gpus N --hardware h100|h200|b200|PROFILE [options]
                    memory and time of every layout of a job, before it is paid for
  report RUN ... [--html|--markdown|--csv|--json FILE] [--watch]
                    figures of runs, side by side
  convert from-hf|to-hf IN OUT
                    models of Hugging Face (Qwen3-MoE, DeepSeek-V3, Kimi K2, ...) in and out
  generate CHECKPOINT|RUN --prompt TEXT
                    continue a text, for a quick look
  doctor [FILE] [--world N] [--json FILE] [options]
                    check this machine, and that the run of FILE fits it
  doctor comm [FILE] [--save PROFILE] [--json FILE] [--ranks-per-node G] [--nproc N] [options]
                    measure links and devices as all ranks of a job
  --version         print the version
  --help            print this; after `train` or `config`: print every option

examples:
  distmoe data prepare --builtin shakespeare --out data/shakespeare
  distmoe train configs/quickstart.toml
  distmoe train configs/quickstart.toml --train.steps 50 --moe.rounding.rule none
  distmoe config configs/eight_gpu.toml --world 8
  torchrun --nproc-per-node 8 -m distmoe train configs/eight_gpu.toml
  deepspeed --hostfile hosts --module distmoe train configs/eight_gpu.toml
  distmoe plan configs/models/sonicmoe_7b.toml --gpus 64 --hardware h100
  torchrun --nproc-per-node 8 -m distmoe doctor comm configs/eight_gpu.toml --save machine.toml
"""

SWITCHES = ("--debug", "--deepspeed")
RESUMES = "the same command resumes from the last checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Run `distmoe ARGV` (sys.argv by default); the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):
        # The deepspeed launcher puts it before everything else; its variables say the same.
        del arguments[0]
    command, *rest = arguments or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"distmoe {__version__}")
        return 0
    if command in OWN:
        return OWN[command](rest)
    if command in MODULES:
        code: int = import_module(MODULES[command]).main(rest)
        return code
    near = nearest(command, COMMANDS)
    advice = f"did you mean '{near}'?" if near else f"known: {', '.join(COMMANDS)}"
    print(f"distmoe: error: unknown command '{command}'; {advice}", file=sys.stderr)
    return 2


@dataclass(frozen=True)
class _Arguments:
    """What follows `train` or `config`."""

    file: str
    overrides: tuple[str, ...] = ()
    debug: bool = False
    world: int = 0
    deepspeed: bool = False
    get: str = ""


def _train(argv: Sequence[str]) -> int:
    first = True
    try:
        if _print_help("train", argv):
            return 0
        ranks = rank_info()
        # Files of another machine may be others.
        first = ranks.local_rank == 0
        arguments = _parse(argv, ("--resume", "--debug"))
        config = load_config(arguments.file, arguments.overrides)
        starts_ranks = ranks.source == "single" and config.launch.nproc > 1
        world = config.launch.nproc if starts_ranks else ranks.world
        local_world = world if starts_ranks else ranks.local_world
        check(config, world, local_world=local_world)
        _check_profile(config.parallel.profile)
        # Reading the tiles imports torch, and this process may be a rank.
        before_torch(debug=arguments.debug)
        _check_tiles(config.moe.kernel_tiles)
    except ConfigError as error:
        # The other ranks of this machine have the same to say.
        if first:
            print_problems("train", error)
        return 2
    if not starts_ranks:
        resolved = resolve(config, world, local_world=local_world)
        return run_worker(resolved, ranks, debug=arguments.debug)
    return _train_here(config, argv)


def _check_profile(path: str) -> None:
    """ConfigError for a file that the cost model cannot read."""
    if not path:
        return
    from distmoe.planner.machine_profile import ProfileError, load_profile

    try:
        load_profile(path)
    except ProfileError as error:
        raise ConfigError(f"parallel.profile: {error}") from error


def _check_tiles(setting: str) -> None:
    """ConfigError for a file that no device can use; each rank looks whether its own can."""
    if setting in ("auto", "default"):
        return
    from distmoe.kernels.moe_mlp.tile_file import TileFileError, read_tiles

    try:
        read_tiles(setting)
    except TileFileError as error:
        raise ConfigError(f"moe.kernel_tiles: {error}") from error


def _train_here(config: Config, argv: Sequence[str]) -> int:
    """Start the ranks of this machine, each with the same arguments."""
    from distmoe.launch.local import run_local

    command = [sys.executable, "-m", "distmoe.launch.cli", "train", *argv]
    return run_local(command, config.launch.nproc, threads=config.launch.threads, advice=RESUMES)


def _config(argv: Sequence[str]) -> int:
    try:
        if _print_help("config", argv):
            return 0
        arguments = _parse(argv, ("--world", "--deepspeed", "--get"))
        config = load_config(arguments.file, arguments.overrides)
        world = arguments.world or config.launch.nproc
        check(config, world)
        resolved = resolve(config, world)
        print(_printed(resolved, world, arguments), end="")
        for line in unused_settings(resolved):
            print(f"distmoe config: warning: {line}", file=sys.stderr)
    except ConfigError as error:
        print_problems("config", error)
        return 2
    return 0


def _printed(config: Config, world: int, arguments: _Arguments) -> str:
    """What `distmoe config` was asked for; ConfigError if there is no such thing."""
    if arguments.deepspeed:
        return _deepspeed_json(config, world)
    if not arguments.get:
        return to_toml(config)
    if arguments.get not in key_types():
        raise ConfigError(f"--get is '{arguments.get}'; {suggestion(arguments.get)}")
    return f"{value_of(config, arguments.get)}\n"


def _deepspeed_json(config: Config, world: int) -> str:
    """What DeepSpeed would be given on this machine; its devices decide what an `auto` dtype is."""
    from distmoe.engines import compute_dtype
    from distmoe.engines.deepspeed_json import deepspeed_json
    from distmoe.runtime import pick_device

    if config.parallel.engine != "deepspeed":
        raise ConfigError(
            f"parallel.engine is {config.parallel.engine}; --deepspeed needs it to be deepspeed"
        )
    dtype = compute_dtype(with_dtype(config, pick_device(config.run.device, 0).type))
    return json.dumps(deepspeed_json(config, world=world, dtype=dtype), indent=2) + "\n"


OWN: dict[str, Callable[[Sequence[str]], int]] = {"train": _train, "config": _config}
# Imported only when called, as some import torch.
MODULES = {
    "launch": "distmoe.launch.launch_command",
    "data": "distmoe.data.cli",
    "checkpoint": "distmoe.checkpoint.cli",
    "plan": "distmoe.planner.plan_cli",
    "report": "distmoe.metrics.report.cli",
    "convert": "distmoe.convert.cli",
    "generate": "distmoe.launch.generate",
    "doctor": "distmoe.launch.doctor.cli",
}
COMMANDS = (*OWN, *MODULES)


def _print_help(command: str, argv: Sequence[str]) -> bool:
    """Whether help was asked for. A file that is named gives the values shown."""
    if "--help" not in argv and "-h" not in argv:
        return False
    named = not argv[0].startswith("-")
    config = load_config(argv[0]) if named else Config()
    print_options(config, f"distmoe {command} {argv[0] if named else 'FILE'}")
    return True


def _parse(argv: Sequence[str], own: Sequence[str]) -> _Arguments:
    """FILE, the command's ``own`` options, and the rest: settings that are changed."""
    if not argv or argv[0].startswith("-"):
        raise ConfigError("the first argument must be a FILE such as configs/quickstart.toml")
    file, *rest = argv
    switches = [option for option in own if option in SWITCHES]
    options, settings = split_options(rest, own, switches=switches)
    if "--resume" in options:
        settings += ["--checkpoint.resume", options["--resume"]]
    return _Arguments(
        file,
        tuple(settings),
        debug="--debug" in options,
        world=integer_option(options, "--world", 0, least=1),
        deepspeed="--deepspeed" in options,
        get=options.get("--get", ""),
    )


if __name__ == "__main__":
    sys.exit(main())
