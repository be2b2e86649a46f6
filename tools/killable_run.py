"""A training run of a few forked ranks that can be killed at any moment, and started again."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmoe.checkpoint.disk import Disk
from distmoe.checkpoint.manifest import read_manifest
from distmoe.checkpoint.store import BESIDE, CheckpointStore
from distmoe.config import Config, RankInfo
from distmoe.launch.ports import free_port
from distmoe.launch.worker import run_worker

# Imported once, here, for all the ranks that are forked from this process.
from distmoe.train import trainer as _trainer  # noqa: F401

TINY = Path(__file__).resolve().parents[1] / "configs/tiny.toml"
TOML = """
extends = "{tiny}"
[run]
dir = "{run}"
[moe]
router = "sigmoid_topk"
bias_update_rate = 0.01
[parallel]
ep = {ranks}
[data]
path = "{data}"
[train]
steps = {steps}
validation_batches = 0
[checkpoint]
every = {every}
keep_last = 2
asynchronous = {asynchronous}
[metrics]
tensorboard = false
"""

CHANGES = ("open", "write", "sync", "sync_folder", "rename", "mkdir", "rm_file", "rmdir")

# How long the launcher leaves the other ranks after one has died.
NOTICE_S = 2.0


class Run:
    """One run in one folder, life after life."""

    def __init__(self, folder: Path, config: Config, ranks: int) -> None:
        self.folder, self.config, self.ranks = folder, config, ranks
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self.pids: list[int] = []

    def start(self, call: tuple[int, int] | None = None) -> None:
        """Fork the ranks, as a process group. ``call``: (rank, number of the change of the disk at
        which it kills them all)."""
        port = free_port()
        self.pids = []
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                place = RankInfo(rank, self.ranks, rank, self.ranks, "127.0.0.1", port, "local")
                _be_rank(self, place, call)
            self.pids.append(pid)
            # Whoever is first: nobody may be killed before it is in the group.
            with contextlib.suppress(PermissionError):
                os.setpgid(pid, self.pids[0])

    def ended(self) -> bool:
        """Whether all ranks have; those that have are reaped."""
        self.pids = [pid for pid in self.pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
        return not self.pids

    def kill(self, *, whole_run: bool, victim: int) -> None:
        """SIGKILL to all ranks, or to one and, if they do not end by themselves, the others."""
        if not whole_run and self.pids:
            os.kill(self.pids[victim % len(self.pids)], signal.SIGKILL)
            wait_until(self.ended, NOTICE_S)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        while not self.ended():
            time.sleep(0.001)

    def steps_done(self) -> int:
        return max((int(record["step"]) for record in self.records()), default=0)

    def records(self) -> list[dict[str, Any]]:
        path = Path(self.config.run.dir) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        # A kill may have cut the last one.
        return [json.loads(line) for line in lines if line.endswith("}")]

    def complete(self) -> list[Path]:
        return CheckpointStore(
            self.checkpoints, group=None, keep_last=1, asynchronous=False
        ).complete()

    def being_written(self) -> set[int]:
        """The inodes of unfinished checkpoints: a kill leaves one, which the next save clears."""
        found = set()
        for path in self.checkpoints.glob(f"{BESIDE}*"):
            with contextlib.suppress(FileNotFoundError):
                found.add(path.stat().st_ino)
        return found

    def log(self) -> str:
        path = self.folder / "rank-0.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def outcome(self) -> tuple[list[tuple[float, float]], dict[str, str]]:
        """(loss, gradient norm) of every step, and the hashes of the last checkpoint's tensors."""
        last = self.complete()[-1]
        marks = read_manifest(last).files
        hashes = {name: mark.sha256 for name, mark in marks.items() if name.endswith(".distcp")}
        return [(r["loss"], r["grad_norm"]) for r in self.records()], hashes


def _be_rank(run: Run, ranks: RankInfo, call: tuple[int, int] | None) -> None:
    """The life of a forked rank; does not return."""
    log = os.open(run.folder / f"rank-{ranks.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    counted = _count_calls(call[1] if call and call[0] == ranks.rank else None)
    code = 1
    try:
        code = run_worker(run.config, ranks)
        (run.folder / f"calls-{ranks.rank}").write_text(str(counted()))
    finally:
        sys.stdout.flush()
        os._exit(code)


def _count_calls(kill_at: int | None) -> Callable[[], int]:
    """Count the changes of the disk by saves, and kill the process group before one of them."""
    calls = 0

    def counting(change: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(change)
        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.killpg(0, signal.SIGKILL)
            return change(*arguments)

        return counted

    for name in CHANGES:
        setattr(Disk, name, counting(getattr(Disk, name)))
    return lambda: calls


def wait_until(true: Callable[[], bool], seconds: float) -> bool:
    """Whether ``true`` came true in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True
