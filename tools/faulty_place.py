"""A folder in which a fault is caused: the smallest run and its data, and what its processes print.

For `show_faults.py`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
TINY = TOOLS.parent / "configs/tiny.toml"

# Of what goes to stdout; stderr is shown whole.
TELLING = re.compile(r"^(error|done at|warning|changed)|is SKIPPED|stopped by|resumed from| NOT ")
STACKS = ("Traceback", "C++", "frame #")

STEP_S = 60.0
LIMIT_S = 120.0

CONFIG = """
extends = "base.toml"
[run]
dir = "run"
[data]
path = "data"
[train]
steps = 8
[metrics]
tensorboard = false
"""


def make_place(folder: Path, data: Path) -> None:
    """A config, and data of its own that may be spoiled."""
    shutil.copytree(data, folder / "data")
    (folder / "base.toml").write_text(f'extends = "{TINY}"')
    (folder / "config.toml").write_text(CONFIG)


@dataclass(frozen=True)
class Seen:
    """What a run printed, its exit code, and how long it took."""

    code: int
    lines: list[str]
    seconds: float
    traceback: bool = False


class Run:
    """`distmoe train` in ``folder``, with a ``fault`` of faulty_run.py; its output goes to files.
    ``environment``: None for this one's, in which it starts its ranks."""

    def __init__(
        self, folder: Path, options: str, fault: str, environment: dict[str, str] | None = None
    ) -> None:
        program = [str(TOOLS / "faulty_run.py"), fault] if fault else ["-m", "distmoe"]
        self.folder, self.begun = folder, time.monotonic()
        self.output = tempfile.TemporaryFile("w+")
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, *program, "train", "config.toml", *options.split()],
            cwd=folder,
            stdout=self.output,
            stderr=self.errors,
            stdin=subprocess.DEVNULL,
            env=environment,
        )

    def wait_for_step(self, step: int) -> None:
        """A run that does not come so far is killed, and then says too little."""
        deadline = time.monotonic() + STEP_S
        while self._steps_done() < step and self.process.poll() is None:
            if time.monotonic() > deadline:
                self.process.kill()
            time.sleep(0.02)

    def _steps_done(self) -> int:
        files = self.folder.rglob("metrics.jsonl")
        return sum(len(file.read_text().splitlines()) for file in files)

    def rank(self, rank: int) -> int:
        """Process id of a rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
                variables = (folder / "environ").read_bytes().split(b"\0")
                if int(parent) == self.process.pid and f"RANK={rank}".encode() in variables:
                    return int(folder.name)
        raise ProcessLookupError(f"no rank {rank}")

    def finish(self) -> Seen:
        """Wait for the end, and read."""
        try:
            code = self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        seconds = time.monotonic() - self.begun
        texts = []
        for stream in (self.output, self.errors):
            stream.seek(0)
            texts.append(stream.read().splitlines())
            stream.close()
        lines = [line for line in texts[0] if TELLING.search(line)] + texts[1]
        traceback = any(sign in line for line in lines for sign in STACKS)
        return Seen(code, lines, round(seconds, 1), traceback)


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system of its own at ``folder``; only for root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
