"""Training runs, small enough for tests, in processes as a user has them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from warm_python import WarmProcess, start_python

TINY = Path(__file__).parents[1] / "configs/tiny.toml"
CONFIG = """
extends = "{tiny}"
[run]
dir = "{run}"
[moe]
router = "sigmoid_topk"
bias_update_rate = 0.01
[data]
path = "{data}"
[train]
steps = 12
validation_batches = 2
[checkpoint]
every = 4
"""

STEPS = 12


def config_file(folder: Path, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "config.toml"
    path.write_text(CONFIG.format(tiny=TINY, run=folder / "run", data=data))
    return path


def start(config: Path, *options: str) -> WarmProcess:
    """`distmoe train`, whose ranks are forks: real processes, but for their imports."""
    return start_python("-m", "distmoe", "train", str(config), *options)


def start_cold(config: Path, *options: str) -> subprocess.Popen[str]:
    """The same with nothing imported before, as a user's."""
    return subprocess.Popen(
        [sys.executable, "-m", "distmoe", "train", str(config), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: WarmProcess | subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == code, output
    return str(output)


def records(config: Path) -> list[dict[str, float]]:
    path = config.parent / "run" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def learning(config: Path) -> list[tuple[float, ...]]:
    names = ("step", "loss", "load_balance_loss", "z_loss", "grad_norm", "lr", "pairs_added")
    return [tuple(record[name] for name in names) for record in records(config)]


def wait_for_step(process: WarmProcess, config: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while len(records(config)) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def worker(launcher: int, rank: int) -> int:
    """Process id of a rank that the launcher started, as it starts them in order."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent == launcher:
            children.append(int(folder.name))
    return sorted(children)[rank]


# Losses of the first steps do not depend on how many follow.
CONSTANT = ["--optim.schedule=constant"]
LONG = [*CONSTANT, "--train.steps=100", "--checkpoint.every=20"]
"""Options of a run that lasts for some seconds, so that something can happen to it."""
