"""Where a fault is caused: a folder with the smallest run, its processes, and what they print.

For `show_faults.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
TINY = TOOLS.parent / "configs/tiny.toml"
DISTMOE = [sys.executable, "-m", "distmoe"]

# Of what goes to stdout; stderr is shown whole.
TELLING = re.compile(r"^(error|done at|warning|changed)|is SKIPPED|stopped by|resumed from| NOT ")
STACKS = ("Traceback", "C++", "frame #")

STEP_S = 60.0
LIMIT_S = 120.0

CONFIG = """
extends = "{tiny}"
[run]
dir = "{folder}/run"
[data]
path = "{data}"
[train]
steps = 8
[metrics]
tensorboard = false
"""


@dataclass(frozen=True)
class Seen:
    """What a run printed, its exit code, and how long it took."""

    code: int
    lines: list[str]
    seconds: float
    traceback: bool = False


class Place:
    """A folder with a config, and prepared data that is copied only where it is spoiled."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        folder.mkdir()
        self.config = folder / "config.toml"
        self.write(data)

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    def write(self, data: Path) -> None:
        self.config.write_text(CONFIG.format(tiny=TINY, folder=self.folder, data=data))

    def own_data(self) -> Path:
        """A copy of the data that may be spoiled."""
        own = self.folder / "data"
        shutil.copytree(self.data, own)
        self.write(own)
        return own

    def run(self, command: Sequence[str], **variables: str) -> Run:
        return Run(command, self.folder, **variables)

    def train(self, *options: str, fault: str = "") -> Seen:
        return finish(self.start(*options, fault=fault))

    def start(self, *options: str, fault: str = "") -> Run:
        faulty = [sys.executable, str(TOOLS / "faulty_run.py"), fault]
        command = faulty if fault else [*DISTMOE, "train"]
        return self.run([*command, str(self.config), *options])

    def alone(self, rank: int) -> Seen:
        """One rank of two machines, whose other one is not there."""
        command = [*DISTMOE, "train", str(self.config), "--launch.timeout_s", "10"]
        there = variables_of(rank, 2, free_port(), on_one_machine=False)
        return finish(self.run(command, **there))

    def ranks(
        self,
        *options_of_ranks: Sequence[str],
        fault: str = "",
        port: int = 0,
        on_one_machine: bool = True,
    ) -> Seen:
        """Started by hand, with the variables of torchrun, each with options of its own."""
        world, port = len(options_of_ranks), port or free_port()
        command = [*DISTMOE, "train"]
        if fault:
            command = [sys.executable, str(TOOLS / "faulty_run.py"), fault, "train"]
        runs = [
            self.run(
                [*command, str(self.config), *options],
                **variables_of(rank, world, port, on_one_machine=on_one_machine),
            )
            for rank, options in enumerate(options_of_ranks)
        ]
        seen = [finish(run) for run in runs]
        return Seen(
            max(one.code for one in seen),
            [line for one in seen for line in one.lines],
            max(one.seconds for one in seen),
            any(one.traceback for one in seen),
        )


def variables_of(rank: int, world: int, port: int, *, on_one_machine: bool) -> dict[str, str]:
    """As torchrun sets them, on one machine or with a machine for every rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank if on_one_machine else 0),
        "LOCAL_WORLD_SIZE": str(world if on_one_machine else 1),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Run:
    """A process in ``folder`` whose output goes to files."""

    def __init__(self, command: Sequence[str], folder: Path, **variables: str) -> None:
        self.begun = time.monotonic()
        self.output = tempfile.TemporaryFile("w+")
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=self.output,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **variables},
        )

    def wait_for_step(self, run_folder: Path, step: int) -> None:
        """A run that does not come so far is killed, and then says too little."""
        deadline = time.monotonic() + STEP_S
        while steps_done(run_folder) < step and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
            time.sleep(0.02)

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                variables = (folder / "environ").read_bytes().split(b"\0")
                if int(parent) == self.process.pid and f"RANK={rank}".encode() in variables:
                    return int(folder.name)
        raise ProcessLookupError(f"no rank {rank}")


def finish(run: Run) -> Seen:
    """Wait for the end, and read."""
    try:
        code = run.process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        run.process.kill()
        code = run.process.wait()
    seconds = time.monotonic() - run.begun
    texts = []
    for stream in (run.output, run.errors):
        stream.seek(0)
        texts.append(stream.read().splitlines())
        stream.close()
    lines = [line for line in texts[0] if TELLING.search(line)] + texts[1]
    traceback = any(sign in line for line in lines for sign in STACKS)
    return Seen(code, lines, round(seconds, 1), traceback)


def steps_done(run_folder: Path) -> int:
    path = run_folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at ``folder``; only for root."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
