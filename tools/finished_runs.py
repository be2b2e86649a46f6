"""For tools that compare runs of `distmoe train`: their options, and runs that are made once."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmoe.arguments import new_file, several
from distmoe.bench.tool import circumstances, split_settings
from distmoe.config import Config, ConfigError, check, load_config, resolve, to_toml


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, seeds: list[int], runs: str
) -> tuple[argparse.Namespace, Config]:
    """The options of ``parser``, which has ``config``, with --seeds, --runs and --json, and as
    ``settings`` what follows --; and the config with these settings, resolved. Ends the tool with 2
    if they are wrong."""
    parser.add_argument("--seeds", type=several(int), default=seeds)
    parser.add_argument("--runs", type=Path, default=Path(runs), help="folder of the runs")
    parser.add_argument("--json", type=new_file)
    own, settings = split_settings(argv)
    arguments = parser.parse_args(own)
    arguments.settings = settings
    try:
        config = load_config(arguments.config, settings)
        check(config, config.launch.nproc)
    except ConfigError as error:
        parser.error(str(error))
    return arguments, resolve(config, config.launch.nproc)


def train_once(file: str, settings: Sequence[str], folder: Path) -> bool:
    """Train into ``folder``, unless that is done already; whether it went well."""
    settings = [*settings, "--run.dir", str(folder)]
    wanted = to_toml(load_config(file, settings))
    # Beside the run, and only when it is finished: what it was started with.
    done = folder / "finished.toml"
    if done.is_file() and done.read_text() == wanted:
        return True
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "distmoe", "train", file, *settings]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        print((folder / "log").read_text()[-2000:], file=sys.stderr)
        print(f"{folder.name} failed; its log is {folder / 'log'}", file=sys.stderr)
        return False
    # The weights of dozens of runs are of no use to anybody.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    done.write_text(wanted)
    return True


def facts_of(config: Config) -> dict[str, Any]:
    """What goes into a file beside the figures of runs."""
    return {
        **circumstances(),
        "device": config.run.device,
        "ranks": config.launch.nproc,
        "steps": config.train.steps,
        "tokens_a_step": config.train.global_batch_size * config.data.seq_len,
    }


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """Of a file of JSON lines that a run has left."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
