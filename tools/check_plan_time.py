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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from two_hosts import FailedError, Hosts, hosts, run_arguments, steps_after

from distmoe.bench.tool import circumstances, console_of, table_of
from distmoe.config import load_config
from distmoe.planner.hardware import find_hardware
from distmoe.planner.plan_job import Planner
from distmoe.planner.step_parts import StepPart

EXCHANGE = ["--moe.dispatch.order=source", "--moe.dispatch.steps=1"]
WAYS = {
    "overlapped": [*EXCHANGE, "--moe.dispatch.level=rank"],
    "copies, no overlap": [
        *EXCHANGE,
        "--moe.dispatch.level=copies",
        "--moe.dispatch.overlap=false",
    ],
}
# A small rate: the first steps of a large one send all tokens to a few experts. Every step has the
# load of every layer.
OF_RUNS = ["--optim.lr=1e-4", "--metrics.expert_load_every=1"]
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
    output = profile.with_suffix(".txt")
    joined.run_distmoe(arguments.ranks, [*command, *arguments.options], output)


def _run(
    joined: Hosts, arguments: argparse.Namespace, way: str, profile: Path, run_dir: Path
) -> Run:
    """Train, and predict with the routing that the run had."""
    settings = [*arguments.options, *WAYS[way]]
    counted = joined.train(arguments, [*OF_RUNS, *settings], run_dir)
    loads = steps_after(arguments.warm_up, run_dir / "expert_load.jsonl")
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


def _show(arguments: argparse.Namespace, runs: Sequence[Run]) -> None:
    a = arguments
    title = f"{a.config.name}, {a.ranks} ranks, two hosts, {a.mbit} Mbit/s; medians of {a.pairs}"
    figures = ("measured s", "predicted s", "error", "errors", "waits s", "predicted s", "skew")
    table = table_of(title, "way", figures)
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
    console_of(120).print(table)


def _record(runs: Sequence[Run]) -> dict[str, object]:
    return {
        **circumstances(),
        "runs": [asdict(run) | {"error": run.error} for run in runs],
    }


if __name__ == "__main__":
    sys.exit(main())
