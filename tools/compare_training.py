"""Whole training runs over two hosts with a slow link, in turn: our defaults against a copy of a
row for every expert without overlap, which is how other systems' eager paths work.

python tools/compare_training.py configs/quickstart.toml
python tools/compare_training.py configs/quickstart.toml --mbit 200 --pairs 5 --json out.json \\
    -- --train.global_batch_size 32

Every run is `distmoe train CONFIG` as --ranks processes on two hosts (network namespaces of its
own, which need root). What follows -- is given to every run. Tokens per second are the median over
the steps after --warm-up; a pair is one run of each kind, and which comes first alternates. Ends
with 2 on a wrong argument, 1 if a run failed, 0 otherwise.
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

from two_hosts import FailedError, Hosts, hosts, run_arguments

from distmoe.bench.tool import circumstances, console_of, table_of

WAYS = {
    "defaults": [],
    "copies, no overlap": ["--moe.dispatch.level=copies", "--moe.dispatch.overlap=false"],
}
FIRST, SECOND = WAYS
SIZES = {"ranks": 2, "mbit": 200, "pairs": 5, "steps": 16, "warm-up": 6}


@dataclass(frozen=True)
class Run:
    """One training run: medians over its steps after the warm-up. ``tokens_per_s`` of all ranks;
    ``loss`` of the last step."""

    way: str
    tokens_per_s: float
    step_s: float
    exposed_share: float
    remote_mib: float
    loss: float


def main(argv: Sequence[str] | None = None) -> int:
    arguments = run_arguments(argv, __doc__ or "", SIZES)
    pairs: list[dict[str, Run]] = []
    try:
        with hosts(arguments.mbit) as joined, tempfile.TemporaryDirectory() as folder:
            for number in range(arguments.pairs):
                order = [FIRST, SECOND] if number % 2 == 0 else [SECOND, FIRST]
                pair = {}
                for way in order:
                    run_dir = Path(folder, f"{number}-{len(pair)}")
                    pair[way] = _train(joined, arguments, way, run_dir)
                    _tell(number, pair[way])
                pairs.append(pair)
    except (FailedError, subprocess.CalledProcessError) as error:
        print(f"compare_training: {error}", file=sys.stderr)
        return 1
    _show(arguments, pairs)
    if arguments.json:
        arguments.json.write_text(json.dumps(_record(pairs), indent=1) + "\n")
    return 0


def _train(joined: Hosts, arguments: argparse.Namespace, way: str, run_dir: Path) -> Run:
    """One run; `FailedError` if it failed."""
    options = ["--metrics.log_every=1", *WAYS[way], *arguments.options]
    counted = joined.train(arguments, options, run_dir)

    def middle(name: str) -> float:
        return statistics.median(record[name] for record in counted)

    return Run(
        way=way,
        tokens_per_s=middle("tokens_per_second_per_rank") * arguments.ranks,
        step_s=middle("step_seconds"),
        exposed_share=middle("exposed_share"),
        remote_mib=middle("remote_mib"),
        loss=counted[-1]["loss"],
    )


def _tell(number: int, run: Run) -> None:
    print(f"pair {number + 1}, {run.way}: {run.tokens_per_s:,.0f} tokens/s", file=sys.stderr)


def _ratios(pairs: list[dict[str, Run]]) -> list[float]:
    return [pair[FIRST].tokens_per_s / pair[SECOND].tokens_per_s for pair in pairs]


def _show(arguments: argparse.Namespace, pairs: list[dict[str, Run]]) -> None:
    a = arguments
    title = (
        f"{a.config.name}, {a.ranks} ranks on two hosts, {a.mbit} Mbit/s, {a.pairs} pairs of runs"
    )
    figures = ("tokens/s", "min", "max", "step s", "exposed", "MiB between hosts", "loss")
    table = table_of(title, "way", figures)
    for way in WAYS:
        runs = [pair[way] for pair in pairs]
        rates = [run.tokens_per_s for run in runs]
        table.add_row(
            way,
            f"{statistics.median(rates):,.0f}",
            f"{min(rates):,.0f}",
            f"{max(rates):,.0f}",
            f"{statistics.median(run.step_s for run in runs):.3f}",
            f"{statistics.median(run.exposed_share for run in runs):.0%}",
            f"{statistics.median(run.remote_mib for run in runs):.1f}",
            f"{statistics.median(run.loss for run in runs):.4f}",
        )
    ratios = _ratios(pairs)
    console = console_of(110)
    console.print(table)
    console.print(
        f"{FIRST} / {SECOND}, pair by pair: median {statistics.median(ratios):.2f}, "
        f"{min(ratios):.2f} to {max(ratios):.2f}",
    )


def _record(pairs: list[dict[str, Run]]) -> dict[str, object]:
    return {
        **circumstances(),
        "ratios": _ratios(pairs),
        "pairs": [[asdict(run) for run in pair.values()] for pair in pairs],
    }


if __name__ == "__main__":
    sys.exit(main())
