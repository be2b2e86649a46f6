"""`distmoe checkpoint inspect`, `verify`, `reshard` and `consolidate`.

Exit code: 2 on wrong arguments, 1 for a checkpoint that is damaged or does not fit, else 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distmoe.arguments import Parser, positive, positive_number
from distmoe.checkpoint.consolidate import consolidate
from distmoe.checkpoint.find import find_checkpoints
from distmoe.checkpoint.inspect import inspect
from distmoe.checkpoint.layouts import layouts, run_config
from distmoe.checkpoint.manifest import damage, read_manifest

GIB = 1 << 30

EXAMPLES = """examples:
  distmoe checkpoint inspect runs/quickstart
  distmoe checkpoint verify runs/quickstart/checkpoints/step-00000200
  distmoe checkpoint reshard runs/quickstart --world 6
  distmoe checkpoint consolidate runs/quickstart --out exported

DIR is a checkpoint, or the folder of a run: its newest checkpoint, or, for verify, all of them.
"""


def main(argv: Sequence[str]) -> int:
    """Run `distmoe checkpoint ARGV`; returns the exit code."""
    try:
        arguments = _build_parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    command = f"distmoe checkpoint {arguments.command}"
    try:
        paths = find_checkpoints(arguments.directory)
    except ValueError as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2
    try:
        code: int = arguments.run(paths, arguments)
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    return code


def _inspect(paths: list[Path], arguments: argparse.Namespace) -> int:
    if arguments.config:
        print(read_manifest(paths[-1]).about.get("config", ""), end="")
        return 0
    inspect(paths[-1], Console(), all_tensors=arguments.all, as_json=arguments.json)
    return 0


def _verify(paths: list[Path], arguments: argparse.Namespace) -> int:
    found = {str(path): damage(path) for path in paths}
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        for path, lines in found.items():
            print(f"{path}: {'; '.join(lines) if lines else 'as it was written'}")
    return 1 if any(found.values()) else 0


def _reshard(paths: list[Path], arguments: argparse.Namespace) -> int:
    path = paths[-1]
    manifest = read_manifest(path)
    config = run_config(manifest)
    world = arguments.world or int(manifest.about["world"])
    found = layouts(config, world)
    if arguments.json:
        print(json.dumps([{**vars(layout)} for layout in found], indent=1))
    else:
        print(f"{path}, written by {manifest.about['world']} ranks, on {world} ranks:")
        for layout in found:
            print(f"  ep {layout.ep:<4} {'; '.join(layout.problems) or 'fits'}")
    return 0 if any(not layout.problems for layout in found) else 1


def _consolidate(paths: list[Path], arguments: argparse.Namespace) -> int:
    path = paths[-1]
    if lines := damage(path):
        raise ValueError(f"{path} is damaged: {'; '.join(lines)}")
    size = round(arguments.max_gib * GIB)
    files = consolidate(path, arguments.out, optimizer=arguments.optimizer, max_bytes=size)
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    return 0


def _build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="distmoe checkpoint", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, epilog=EXAMPLES, formatter_class=raw)
        own.add_argument("directory", type=Path, metavar="DIR")
        own.set_defaults(run=run)
        return own

    own = add("inspect", _inspect, "who wrote it, and its tensors")
    own.add_argument("--all", action="store_true", help="the optimizer's tensors too")
    own.add_argument("--config", action="store_true", help="print the run's settings only, as TOML")
    own.add_argument("--json", action="store_true", help="print JSON")
    own = add("verify", _verify, "hash all files; ends with 1 if one is not as it was written")
    own.add_argument("--json", action="store_true", help="print JSON")
    own = add("reshard", _reshard, "with which ep the run can go on from it on other ranks")
    own.add_argument("--world", type=positive, metavar="N", help="ranks (default: as many)")
    own.add_argument("--json", action="store_true", help="print JSON")
    own = add("consolidate", _consolidate, "whole tensors, as safetensors")
    own.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    own.add_argument("--optimizer", action="store_true", help="with the optimizer's moments")
    own.add_argument(
        "--max-gib",
        type=positive_number,
        default=5.0,
        metavar="N",
        help="largest file, and memory that is used (default %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
