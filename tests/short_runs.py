"""Runs of one rank in this process, over in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training_runs import config_file

from distmoe.config import RankInfo, load_config, resolve
from distmoe.train.trainer import train

STEPS = 6
SHORT = f"--launch.nproc 1 --parallel.ep 1 --train.steps {STEPS} --checkpoint.every 2".split()
SHORT += "--train.validation_batches 0 --metrics.tensorboard false".split()


def train_here(folder: Path, data: Path, *options: str) -> Path:
    """Train to the end of SHORT and ``options``; the config's path."""
    path = config_file(folder, data)
    train(resolve(load_config(path, [*SHORT, *options]), 1), RankInfo())
    return path


def starts(folder: Path) -> list[dict[str, Any]]:
    """When a run was started, and from which step."""
    lines = map(json.loads, (folder / "starts.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "start"]
