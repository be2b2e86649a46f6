"""`distmoe report RUN ...`. Exit code: 2 for a wrong argument, 1 for a broken run, else 0."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from distmoe.arguments import Parser, new_file, positive_number
from distmoe.metrics.report.run_files import NoStepsError, ReportError, Run, read_run
from distmoe.metrics.report.tables import as_csv, as_json, as_markdown, print_report

EXAMPLES = """examples:
  distmoe report runs/quickstart
  distmoe report runs/quickstart --watch
  distmoe report runs/balance runs/none --html compare.html --markdown compare.md
"""

# A table that is not on a terminal has room for its labels and for each run.
LABEL_WIDTH, RUN_WIDTH = 48, 60


def main(argv: Sequence[str]) -> int:
    """Run `distmoe report ARGV`; returns the exit code."""
    parser = _build_parser()
    try:
        arguments = parser.parse_args(list(argv))
        if arguments.html and find_spec("matplotlib") is None:
            parser.error("--html needs matplotlib: pip install 'distmoe[report]'")
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        if arguments.watch is None:
            _report(arguments)
        else:
            _watch(arguments)
    except (ReportError, OSError) as error:
        print(f"distmoe report: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _report(arguments: argparse.Namespace) -> bool:
    """Read, print and write once; whether all runs have ended."""
    runs = [read_run(folder) for folder in arguments.runs]
    console = Console()
    if console.is_terminal:
        if arguments.watch is not None:
            console.clear()
    else:
        console = Console(width=LABEL_WIDTH + RUN_WIDTH * len(runs))
    print_report(runs, console)
    for path, write in _writers(arguments).items():
        path.write_text(write(runs))
    return all(run.ended for run in runs)


def _writers(arguments: argparse.Namespace) -> dict[Path, Callable[[Sequence[Run]], str]]:
    """What makes each file that was asked for."""

    def as_html(runs: Sequence[Run]) -> str:
        # matplotlib is imported for pictures only.
        from distmoe.metrics.report.page import as_html

        return as_html(runs)

    asked = (
        (arguments.markdown, as_markdown),
        (arguments.csv, as_csv),
        (arguments.json, as_json),
        (arguments.html, as_html),
    )
    return {path: write for path, write in asked if path is not None}


def _watch(arguments: argparse.Namespace) -> None:
    """Report every few seconds until all runs have ended."""
    while True:
        try:
            if _report(arguments):
                return
        except NoStepsError as error:
            print(f"distmoe report: {error}", flush=True)
        time.sleep(arguments.watch)


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="distmoe report",
        description="Figures of one or more runs, side by side, from the files in their folders.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    kinds = {
        "markdown": "tables as Markdown",
        "csv": "a line for each run, numbers in full",
        "json": "figures and settings",
        "html": "one page with pictures",
    }
    for kind, text in kinds.items():
        parser.add_argument(f"--{kind}", type=new_file, metavar="FILE", help=text)
    parser.add_argument(
        "--watch",
        type=positive_number,
        nargs="?",
        const=5.0,
        metavar="SECONDS",
        help="again every so many seconds (%(const)s) until the runs have ended",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
