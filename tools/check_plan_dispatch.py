"""What the cost model says of ways to exchange rows that were measured, and how good its choice is.

python tools/check_plan_dispatch.py docs/benchmarks/dispatch-*.json
python tools/check_plan_dispatch.py docs/benchmarks/dispatch-*.json --write

Files of tools/bench_dispatch.py --json, which hold sizes, links, rates and times; nothing is
measured. *Regret*: how much longer the way takes that the model calls the fastest than the one that
was, of those whose rows travel as they are computed: in how many bytes is no choice of the model.
--write puts the predictions into the files. Ends with 2 on a wrong argument, 1 if a prediction
is off by more than --most, 0 otherwise.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_dispatch import settings_of
from rich.console import Console
from rich.table import Table

from distmoe.bench.dispatch.measure import Timing
from distmoe.bench.dispatch.session import predicted_s
from distmoe.planner.machine_profile import profile_of


@dataclass(frozen=True)
class Measured:
    """One way: median seconds of forward and backward, and those that are predicted."""

    name: str
    row_dtype: str
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def predict_again(record: dict[str, Any], source: str) -> list[Measured]:
    """The ways of a file, whose predictions are replaced."""
    settings = settings_of(shlex.split(record["command"])[2:])
    ways = [line for line in record["lines"] if line["predicted_s"] is not None]
    predictions = predicted_s(settings, profile_of(record["profile"], source))
    found = []
    for way, line, seconds in zip(settings.ways, ways, predictions, strict=True):
        line["predicted_s"] = seconds
        measured_s = statistics.median(Timing(**line["timing"]).total_s)
        found.append(Measured(way.name, way.row_dtype, measured_s, seconds))
    return found


def regret(ways: Sequence[Measured]) -> float:
    """Over the fastest way that was measured, with rows as they are computed."""
    ways = [way for way in ways if way.row_dtype == "computed"]
    chosen = min(ways, key=lambda way: way.predicted_s)
    return chosen.measured_s / min(way.measured_s for way in ways) - 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--write", action="store_true", help="predictions into the files")
    parser.add_argument("--most", type=float, default=0.3, help="error of a way (0.3)")
    arguments = parser.parse_args(argv)
    for file in arguments.files:
        if not file.is_file():
            parser.error(f"FILE is {file}; it must be one of tools/bench_dispatch.py --json")
    records = {file: json.loads(file.read_text()) for file in arguments.files}
    found = {file.stem: predict_again(record, str(file)) for file, record in records.items()}
    _show(found)
    if arguments.write:
        for file, record in records.items():
            file.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(abs(way.error) > arguments.most for ways in found.values() for way in ways))


def _show(found: dict[str, list[Measured]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("way", "measured ms", "predicted ms", "error"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    for name, ways in found.items():
        table.add_row(f"{name}: regret {regret(ways):.1%}")
        for way in ways:
            times = (f"{1e3 * seconds:,.0f}" for seconds in (way.measured_s, way.predicted_s))
            table.add_row(f"  {way.name}", *times, f"{way.error:+.1%}")
    errors = sorted(abs(way.error) for ways in found.values() for way in ways)
    console = Console()
    console.print(table)
    console.print(
        f"{len(errors)} ways: mean error {statistics.fmean(errors):.1%}, largest {errors[-1]:.1%}",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
