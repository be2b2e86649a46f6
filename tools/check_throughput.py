"""Compare the tokens/s that a run reports with a stopwatch outside of it.

python tools/check_throughput.py configs/quickstart.toml --steps 60
python tools/check_throughput.py configs/quickstart.toml --steps 200 --json throughput.json

`distmoe train` runs in a folder of its own, with validations and checkpoints; SIGTERM ends it half
way, and the same command resumes it. This program, another process with a clock of its own, looks
at the size of metrics.jsonl every few milliseconds and notes when each step's line has come. Of
both starts, from the first line to the last one:

- all:      tokens / seconds of the stopwatch, against tokens / (step_seconds + validation_seconds +
            checkpoint_seconds) of the lines
- training: median tokens/s of the steps that follow no validation and no checkpoint, first steps
            left out, by the stopwatch and by tokens_per_second_per_rank

Other options go to `distmoe train`. Exit code: 1 if one of them differs by more than 2 %.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distmoe.arguments import new_file
from distmoe.bench.tool import command_line

LIMIT = 0.02
LOOK_S = 0.002
STOPPED_BY_SIGNAL = 75

# What the time between two lines is made of.
WHOLE = ("step_seconds", "validation_seconds", "checkpoint_seconds")


@dataclass(frozen=True)
class Comparison:
    """``stopwatch`` and ``reported`` in tokens/s of all ranks, over ``steps`` steps."""

    name: str
    steps: int
    stopwatch: float
    reported: float

    @property
    def error(self) -> float:
        """Of what is reported, over the stopwatch."""
        return self.reported / self.stopwatch - 1


@dataclass(frozen=True)
class Seen:
    """A line of metrics.jsonl, and when it came."""

    line: dict[str, Any]
    at: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments, options = _parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        every = max(arguments.steps // 6, 1)
        command = [
            *(sys.executable, "-m", "distmoe", "train", arguments.file),
            *(f"--run.dir={run}", f"--train.steps={arguments.steps}"),
            *(f"--train.validate_every={every}", f"--checkpoint.every={every + 1}"),
            *options,
        ]
        first = watch(command, run, stop_at=arguments.steps // 2)
        second = watch(command, run, stop_at=None)
    comparisons = compare([first, second])
    for it in comparisons:
        print(
            f"{it.name:<9} {it.steps:>4} steps  stopwatch {it.stopwatch:>10,.1f} tokens/s  "
            f"reported {it.reported:>10,.1f} tokens/s  {it.error:+.2%}"
        )
    if arguments.json:
        facts = {"command": command_line(), "comparisons": [asdict(it) for it in comparisons]}
        arguments.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if any(abs(it.error) > LIMIT for it in comparisons) else 0


def watch(command: Sequence[str], run: Path, *, stop_at: int | None) -> list[Seen]:
    """Run until the end, or until SIGTERM at step ``stop_at``: the lines that came meanwhile."""
    path = run / "metrics.jsonl"
    old = path.read_text().count("\n") if path.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    arrivals: list[float] = []
    size, sent = 0, False
    while process.poll() is None:
        time.sleep(LOOK_S)
        now_size = path.stat().st_size if path.exists() else 0
        if now_size == size:
            continue
        now, size = time.perf_counter(), now_size
        count = path.read_text().count("\n")
        arrivals += [now] * max(count - old - len(arrivals), 0)
        if stop_at is not None and count >= stop_at and not sent:
            process.send_signal(signal.SIGTERM)
            sent = True
    expected = STOPPED_BY_SIGNAL if stop_at is not None else 0
    if process.returncode != expected:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    lines = [json.loads(line) for line in path.read_text().splitlines()[old:]]
    return [Seen(line, at) for line, at in zip(lines, arrivals, strict=True)]


def compare(starts: Sequence[Sequence[Seen]]) -> list[Comparison]:
    pairs = [pair for seen in starts for pair in zip(seen, seen[1:], strict=False)]
    tokens = sum(after.line["tokens"] for _, after in pairs)
    watched = sum(after.at - before.at for before, after in pairs)
    reported = sum(after.line[name] for _, after in pairs for name in WHOLE)
    training = [
        (before, after)
        for before, after in pairs
        if not after.line["warm_up"]
        and after.line["validation_seconds"] == 0
        and after.line["checkpoint_seconds"] == 0
    ]
    by_watch = [after.line["tokens"] / (after.at - before.at) for before, after in training]
    by_line = [
        after.line["tokens_per_second_per_rank"] * after.line["ranks"] for _, after in training
    ]
    return [
        Comparison("all", len(pairs), tokens / watched, tokens / reported),
        Comparison(
            "training", len(training), statistics.median(by_watch), statistics.median(by_line)
        ),
    ]


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="TOML file of a run")
    parser.add_argument("--steps", type=int, default=60, help="of the run (default %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures")
    arguments, options = parser.parse_known_args(argv)
    if arguments.steps < 24:
        parser.error(f"--steps is {arguments.steps}; it must be at least 24")
    return arguments, options


if __name__ == "__main__":
    sys.exit(main())
