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
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from killable_run import TINY, TOML, Run, wait_until
from rich.console import Console

from distmoe.arguments import new_file
from distmoe.bench.tool import add_sizes, circumstances, table_of
from distmoe.checkpoint.manifest import damage
from distmoe.checkpoint.store import step_of
from distmoe.config import load_config, resolve
from distmoe.data.cli import main as data_main

MOMENTS = ("time", "step", "write", "call")

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
                tiny=TINY,
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
        before, left_over = self._newest(run), run.being_written()
        moment = self.random.choice(MOMENTS)
        victim = self.random.randrange(run.ranks)
        whole_run = moment == "call" or self.random.random() > SHARE_OF_ONE_RANK
        begun = time.monotonic()
        call = self.random.randint(1, 3 * self.calls[victim])
        run.start((victim, call) if moment == "call" else None)
        self._wait_for(moment, run, before, left_over)
        if run.ended() and "done at step" in run.log():
            return False
        seconds = time.monotonic() - begun
        run.kill(whole_run=whole_run, victim=victim)
        problems = self._problems(run, before)
        newest, done = self._newest(run), run.steps_done()
        lost = max(0, done - newest)
        if lost > self.allowed:
            problems.append(f"{lost} steps lost, more than {self.allowed}")
        was_writing = bool(run.being_written() - left_over)
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

    def _wait_for(self, moment: str, run: Run, before: int, left_over: set[int]) -> None:
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
                    or (time.monotonic() > skip and bool(run.being_written() - left_over))
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
    title = f"{arguments.ranks} ranks, {arguments.steps} steps, a save every {arguments.every}"
    figures = ("kills", "all ranks", "mid-write", "most steps lost", "problems")
    table = table_of(title, "killed", figures)
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
        **circumstances(),
        "seconds": round(seconds, 1),
        "calls_of_a_save_by_rank": trial.calls,
        "runs_finished": trial.finished,
        "differences": trial.differences,
        "steps_that_may_be_lost": trial.allowed,
        "kills": [asdict(kill) for kill in trial.kills],
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_sizes(parser, {"kills": 200, "ranks": 2, "steps": 30, "every": 2})
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--synchronous", action="store_true", help="saves stop the training")
    parser.add_argument("--work", type=Path, help="folder for the runs, on the disk to be tried")
    parser.add_argument("--json", type=new_file)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
