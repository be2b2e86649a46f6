"""Step times of short training runs over two hosts with a slow link, against what `distmoe plan`
predicts from a profile that was measured right before.

python tools/check_plan_time.py configs/quickstart.toml
python tools/check_plan_time.py configs/quickstart.toml --mbit 200 --pairs 3 --json out.json \\
    -- --train.global_batch_size 32

A pair is `distmoe doctor comm` and one training run of each way, as --ranks processes on two hosts
(network namespaces of its own, which need root). What follows -- is given to all. The measured time
is the median over the steps after --warm-up. Ends with 2 on a wrong argument, 1 if a run failed,
0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from two_hosts import Hosts, hosts, run_arguments

from distmoe.bench.command_line import command_line
from distmoe.config import load_config
from distmoe.planner.hardware import find_hardware
from distmoe.planner.plan_job import Planner
from distmoe.planner.step_parts import StepPart

EXCHANGE = ["--moe.dispatch.order", "source", "--moe.dispatch.steps", "1"]
WAYS = {
    "overlapped": [*EXCHANGE, "--moe.dispatch.level", "rank"],
    "copies, no overlap": [
        *EXCHANGE,
        "--moe.dispatch.level",
        "copies",
        "--moe.dispatch.overlap",
        "false",
    ],
}
# A small rate: the first steps of a large one send all tokens to a few experts.
LEARNING = ["--optim.warmup_steps", "0", "--optim.lr", "1e-4"]
QUIET = [*LEARNING, "--train.validate_every", "0", "--checkpoint.every", "0"]
# Every step has the load of every layer.
QUIET += ["--metrics.expert_load_every", "1"]
SIZES = {"ranks": 2, "mbit": 200, "pairs": 3, "steps": 12, "warm-up": 4}


@dataclass(frozen=True)
class Run:
    """``skew``: the busiest expert over the mean, which the prediction was given. Seconds of the
    waits for the exchange, measured on the mean rank, and predicted."""

    way: str
    measured_s: float
    predicted_s: float
    measured_wait_s: float
    predicted_wait_s: float
    skew: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


class FailedError(Exception):
    """A run ended badly."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = run_arguments(argv, __doc__ or "", SIZES)
    runs: list[Run] = []
    try:
        with hosts(arguments.mbit) as joined, tempfile.TemporaryDirectory() as folder:
            for number in range(arguments.pairs):
                profile = Path(folder, f"{number}.toml")
                _measure(joined, arguments, profile)
                for way in WAYS:
                    run_dir = Path(folder, f"{number}-{len(runs)}")
                    run_dir.mkdir()
                    runs.append(_run(joined, arguments, way, profile, run_dir))
                    print(f"pair {number + 1}: {runs[-1]}", file=sys.stderr)
    except (FailedError, subprocess.CalledProcessError) as error:
        print(f"check_plan_time: {error}", file=sys.stderr)
        return 1
    _show(arguments, runs)
    if arguments.json:
        arguments.json.write_text(json.dumps(_record(runs), indent=1) + "\n")
    return 0


def _measure(joined: Hosts, arguments: argparse.Namespace, profile: Path) -> None:
    """A profile of the two hosts as they are now."""
    command = ["doctor", "comm", str(arguments.config), "--save", str(profile)]
    _ranks(joined, arguments, [*command, *_settings(arguments)], profile.with_suffix(".txt"))


def _run(
    joined: Hosts, arguments: argparse.Namespace, way: str, profile: Path, run_dir: Path
) -> Run:
    """Train, and predict with the routing that the run had."""
    settings = [*_settings(arguments), *WAYS[way]]
    steps = ["--train.steps", str(arguments.steps), "--run.dir", str(run_dir)]
    command = ["train", str(arguments.config), *QUIET, *settings, *steps]
    _ranks(joined, arguments, command, run_dir / "output.txt")
    counted, loads = (
        [line for line in _lines(run_dir / name) if line["step"] > arguments.warm_up]
        for name in ("metrics.jsonl", "expert_load.jsonl")
    )
    skew = statistics.fmean(
        layer["load_max_over_mean"] for load in loads for layer in load["layers"]
    )
    hardware = find_hardware(str(profile))
    config = load_config(arguments.config, settings)
    time = Planner(config, arguments.ranks, hardware, skew=skew).layout(config).time
    return Run(
        way=way,
        measured_s=statistics.median(record["step_seconds"] for record in counted),
        predicted_s=time.seconds,
        measured_wait_s=statistics.median(record["exposed_seconds"] for record in counted),
        predicted_wait_s=time.parts_s[StepPart.EXCHANGE] + time.parts_s[StepPart.SLOWER_RANKS],
        skew=skew,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _settings(arguments: argparse.Namespace) -> list[str]:
    """Of the measurement and of the runs."""
    return ["--parallel.ep", str(arguments.ranks), *arguments.options]


def _ranks(
    joined: Hosts, arguments: argparse.Namespace, command: Sequence[str], output: Path
) -> None:
    """`distmoe COMMAND` as all ranks; `FailedError` with its last lines."""
    threads = str(max(1, (os.cpu_count() or 1) // arguments.ranks))
    variables = {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    each = [sys.executable, "-m", "distmoe", *command]
    with output.open("wb") as file:
        ended_well = joined.run_ranks([each] * arguments.ranks, variables=variables, output=file)
    if not ended_well:
        raise FailedError("\n".join(output.read_text().strip().splitlines()[-5:]))


def _show(arguments: argparse.Namespace, runs: Sequence[Run]) -> None:
    a = arguments
    table = Table(
        title=f"{a.config.name}, {a.ranks} ranks, two hosts, {a.mbit} Mbit/s; medians of {a.pairs}",
        title_justify="left",
        box=None,
    )
    table.add_column("way", no_wrap=True)
    for name in ("measured s", "predicted s", "error", "errors", "waits s", "predicted s", "skew"):
        table.add_column(name, justify="right")
    for way in WAYS:
        of_way = [run for run in runs if run.way == way]
        errors = sorted(run.error for run in of_way)

        def middle(name: str, of_way: Sequence[Run] = of_way) -> str:
            return f"{statistics.median(getattr(run, name) for run in of_way):.3f}"

        table.add_row(
            way,
            middle("measured_s"),
            middle("predicted_s"),
            f"{statistics.median(errors):+.0%}",
            f"{errors[0]:+.0%} to {errors[-1]:+.0%}",
            middle("measured_wait_s"),
            middle("predicted_wait_s"),
            middle("skew"),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)


def _record(runs: Sequence[Run]) -> dict[str, object]:
    return {
        "command": command_line(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "runs": [asdict(run) | {"error": run.error} for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main())
