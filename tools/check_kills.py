"""Kill a training run at random moments, again and again, and see what its checkpoints are worth.

python tools/check_kills.py --kills 20
python tools/check_kills.py --kills 200 --json docs/benchmarks/kills.json

A tiny model trains on several ranks and saves every few steps. SIGKILL ends all ranks, or one and
then those that wait for it: after a random time, around a random step, while a checkpoint is being
written, or before a random change of the disk (an open, write, sync, rename or delete by one rank).
Then every checkpoint is hashed, and the same command resumes. A run that reaches its end must have
the losses of an unbroken one and the same bytes in its last checkpoint; then the next run begins.
Exit code: 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from distmoe.checkpoint.disk import Disk
from distmoe.checkpoint.manifest import damage, read_manifest
from distmoe.checkpoint.store import BESIDE, CheckpointStore, step_of
from distmoe.config import Config, RankInfo, load_config, resolve
from distmoe.data.cli import main as data_main
from distmoe.launch.worker import run_worker
from distmoe.planner.command_line import command_line

# Imported once, here, for all the ranks that are forked from this process.
from distmoe.train import trainer as _trainer  # noqa: F401

TOML = """
[run]
dir = "{run}"
device = "cpu"
[launch]
threads = 1
[model]
hidden_size = 32
n_layers = 2
n_heads = 2
n_kv_heads = 1
intermediate_size = 64
[moe]
num_experts = 4
top_k = 2
intermediate_size = 16
router = "sigmoid_topk"
bias_update_rate = 0.01
[moe.rounding]
tile = 8
[parallel]
ep = {ranks}
[data]
path = "{data}"
seq_len = 32
[optim]
warmup_steps = 2
[train]
steps = {steps}
global_batch_size = 4
validate_every = 0
validation_batches = 0
[checkpoint]
every = {every}
keep_last = 2
asynchronous = {asynchronous}
[metrics]
log_every = 1
tensorboard = false
"""

MOMENTS = ("time", "step", "write", "call")
CHANGES = ("open", "write", "sync", "sync_folder", "rename", "mkdir", "rm_file", "rmdir")

# How long the launcher leaves the other ranks after one has died.
NOTICE_S = 2.0
PATIENCE_S = 60.0
SHARE_OF_ONE_RANK = 0.2


@dataclass(frozen=True)
class Kill:
    """One kill, and what was found after it. ``lost_steps``: steps done less those of the newest
    checkpoint. ``problems``: what must not be."""

    moment: str
    whole_run: bool
    seconds: float
    done: int
    newest: int
    lost_steps: int
    was_writing: bool
    problems: list[str] = field(default_factory=list)


class Run:
    """One run in one folder, life after life."""

    def __init__(self, folder: Path, config: Config, ranks: int) -> None:
        self.folder, self.config, self.ranks = folder, config, ranks
        self.checkpoints = Path(config.run.dir) / "checkpoints"
        self.pids: list[int] = []

    def start(self, call: tuple[int, int] | None = None) -> None:
        """Fork the ranks, as a process group. ``call``: (rank, number of the change of the disk at
        which it kills them all)."""
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids = []
        for rank in range(self.ranks):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                _be_rank(
                    self,
                    RankInfo(rank, self.ranks, rank, self.ranks, "127.0.0.1", port, "local"),
                    call,
                )
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
        return CheckpointStore(self.checkpoints, keep_last=1, asynchronous=False).complete()

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


class Trial:
    """Unbroken once, then killed until there have been enough kills."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.random = random.Random(arguments.seed)
        self.kills: list[Kill] = []
        self.finished = 0
        self.differences: list[str] = []
        self.run = self._new_run("unbroken")
        begun = time.monotonic()
        self._finish(self.run)
        self.life_s = time.monotonic() - begun
        self.expected = self.run.outcome()
        saves = len(range(0, arguments.steps, arguments.every))
        self.calls = [
            int((self.run.folder / f"calls-{rank}").read_text()) // saves
            for rank in range(arguments.ranks)
        ]
        steps = [record["step_seconds"] for record in self.run.records()]
        self.step_s = sorted(steps)[len(steps) // 2]

    def _new_run(self, name: str) -> Run:
        folder = self.folder / name
        folder.mkdir()
        path = folder / "config.toml"
        arguments = self.arguments
        path.write_text(
            TOML.format(
                run=folder / "run",
                data=self.folder / "data",
                ranks=arguments.ranks,
                steps=arguments.steps,
                every=arguments.every,
                asynchronous=str(not arguments.synchronous).lower(),
            )
        )
        config = resolve(load_config(str(path), ()), arguments.ranks, local_world=arguments.ranks)
        return Run(folder, config, arguments.ranks)

    def _finish(self, run: Run) -> None:
        run.start()
        if not wait_until(run.ended, PATIENCE_S):
            raise RuntimeError(f"the run in {run.folder} does not end:\n{run.log()}")
        if "done at step" not in run.log():
            raise RuntimeError(f"the run in {run.folder} failed:\n{run.log()}")

    def go(self) -> None:
        """All kills."""
        number = 0
        while len(self.kills) < self.arguments.kills:
            number += 1
            run = self._new_run(f"run-{number}")
            while len(self.kills) < self.arguments.kills and self._live(run):
                pass
            if len(self.kills) >= self.arguments.kills:
                self._finish(run)
            self._compare(run)
            shutil.rmtree(run.folder)

    def _live(self, run: Run) -> bool:
        """One life of a run; False if it ended before its kill."""
        before = self._newest(run)
        moment = self.random.choice(MOMENTS)
        victim = self.random.randrange(run.ranks)
        whole_run = moment == "call" or self.random.random() > SHARE_OF_ONE_RANK
        begun = time.monotonic()
        call = self.random.randint(1, 3 * self.calls[victim])
        run.start((victim, call) if moment == "call" else None)
        self._wait_for(moment, run, before)
        if run.ended() and "done at step" in run.log():
            return False
        seconds = time.monotonic() - begun
        run.kill(whole_run=whole_run, victim=victim)
        problems = self._problems(run, before)
        newest, done = self._newest(run), run.steps_done()
        lost = max(0, done - newest)
        if lost > self.allowed:
            problems.append(f"{lost} steps lost, more than {self.allowed}")
        was_writing = any(run.checkpoints.glob(f"{BESIDE}*"))
        self.kills.append(
            Kill(moment, whole_run, seconds, done, newest, lost, was_writing, problems)
        )
        for problem in problems:
            print(f"kill {len(self.kills)}: {problem}", file=sys.stderr)
        return True

    @property
    def allowed(self) -> int:
        """A save waits for the one before. So, behind the loop, one may be in flight and the next
        due; otherwise one."""
        return self.arguments.every * (1 if self.arguments.synchronous else 2)

    def _wait_for(self, moment: str, run: Run, before: int) -> None:
        """Until it is time for the kill."""
        pause = 0.0
        if moment == "time":
            pause = self.random.uniform(0, self.life_s / 2)
        elif moment == "step":
            step = before + self.random.randint(1, 3 * self.arguments.every)
            wait_until(lambda: run.ended() or run.steps_done() >= step, PATIENCE_S)
            pause = self.random.uniform(0, 2 * self.step_s)
        elif moment == "write":
            skip = time.monotonic() + self.random.uniform(0, self.life_s / 2)
            wait_until(
                lambda: (
                    run.ended()
                    or (time.monotonic() > skip and any(run.checkpoints.glob(f"{BESIDE}*")))
                ),
                PATIENCE_S,
            )
            pause = self.random.uniform(0, self.step_s)
        else:
            pause = PATIENCE_S
        wait_until(run.ended, pause)

    def _newest(self, run: Run) -> int:
        complete = run.complete()
        return step_of(complete[-1]) if complete else 0

    def _problems(self, run: Run, before: int) -> list[str]:
        """Of the checkpoints after a kill; ``before``: the newest when the life began."""
        problems = [f"{p.name}: {line}" for p in run.complete() for line in damage(p)]
        if self._newest(run) < before:
            problems.append(f"the newest checkpoint was {before}, and is {self._newest(run)}")
        log = run.log()
        state = next((line for line in log.splitlines() if line.startswith("  state ")), "")
        expected = f"resumed from {run.checkpoints / f'step-{before:08d}'}" if before else "new run"
        if state and expected not in state:
            problems.append(f"expected '{expected}', but: {state.strip()}")
        if "is damaged" in log:
            problems.append("a checkpoint was found damaged")
        return problems

    def _compare(self, run: Run) -> None:
        """A run that has ended with the unbroken one."""
        self.finished += 1
        losses, hashes = run.outcome()
        if losses != self.expected[0]:
            self.differences.append(f"{run.folder.name}: other losses than the unbroken run")
        if hashes != self.expected[1]:
            self.differences.append(f"{run.folder.name}: another last checkpoint")
        names = [path.name for path in run.checkpoints.iterdir()]
        if any(not name.startswith("step-") for name in names):
            self.differences.append(f"{run.folder.name}: left over: {names}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        folder = Path(name)
        # Not here: what it starts must not be forked.
        pid = os.fork()
        if pid == 0:
            code = data_main(["prepare", "--builtin", "shakespeare", "--out", str(folder / "data")])
            os._exit(code)
        os.waitpid(pid, 0)
        trial = Trial(arguments, folder)
        trial.go()
    seconds = time.monotonic() - begun
    print_table(trial, seconds)
    if arguments.json:
        arguments.json.write_text(json.dumps(_facts(trial, seconds), indent=1) + "\n")
    return 1 if trial.differences or any(kill.problems for kill in trial.kills) else 0


def print_table(trial: Trial, seconds: float) -> None:
    """A line for every kind of moment, and the sum."""
    arguments, console = trial.arguments, Console(highlight=False)
    table = Table(
        title=f"{arguments.ranks} ranks, {arguments.steps} steps, a save every {arguments.every}"
    )
    for column in ("killed", "kills", "all ranks", "mid-write", "most steps lost", "problems"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for moment in (*MOMENTS, "in all"):
        kills = [kill for kill in trial.kills if moment in (kill.moment, "in all")]
        table.add_row(
            moment,
            str(len(kills)),
            str(sum(kill.whole_run for kill in kills)),
            str(sum(kill.was_writing for kill in kills)),
            str(max((kill.lost_steps for kill in kills), default=0)),
            str(sum(len(kill.problems) for kill in kills)),
        )
    console.print(table)
    console.print(
        f"{trial.finished} runs reached their end, {len(trial.differences)} differences to the "
        f"unbroken run; steps that may be lost: {trial.allowed}; {seconds:.0f} s"
    )
    for difference in trial.differences:
        console.print(difference)


def _facts(trial: Trial, seconds: float) -> dict[str, Any]:
    return {
        "command": command_line(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": round(seconds, 1),
        "calls_of_a_save_by_rank": trial.calls,
        "kills_by_moment": dict(Counter(kill.moment for kill in trial.kills)),
        "runs_finished": trial.finished,
        "differences": trial.differences,
        "steps_that_may_be_lost": trial.allowed,
        "kills": [asdict(kill) for kill in trial.kills],
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in {"kills": 200, "ranks": 2, "steps": 30, "every": 2, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=str(default))
    parser.add_argument("--synchronous", action="store_true", help="saves stop the training")
    parser.add_argument("--work", type=Path, help="folder for the runs, on the disk to be tried")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    for name in ("kills", "ranks", "steps", "every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
