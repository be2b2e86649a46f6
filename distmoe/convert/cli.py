"""`distmoe convert from-hf` and `to-hf`.

Exit code: 2 for a wrong argument or a model that cannot be converted, 1 for a failure, else 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from distmoe.arguments import Parser, positive_number
from distmoe.checkpoint.find import find_checkpoints
from distmoe.registry import ARCHITECTURES

GIB = 1 << 30

EXAMPLES = """examples:
  distmoe convert from-hf OLMoE-1B-7B-0924 models/olmoe
  distmoe train models/olmoe/config.toml --data.path data/corpus
  distmoe convert to-hf runs/olmoe exported
"""


def main(argv: Sequence[str]) -> int:
    """Run `distmoe convert ARGV`; returns the exit code."""
    try:
        arguments = _build_parser().parse_args(list(argv))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        arguments.run(arguments)
    except ValueError as error:
        for line in str(error).splitlines():
            print(f"distmoe convert {arguments.command}: error: {line}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"distmoe convert {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _from_hf(arguments: argparse.Namespace) -> None:
    from distmoe.convert.from_hf import import_model

    path = import_model(arguments.model, arguments.out)
    print(f"{path}\ntrain on: distmoe train {arguments.out / 'config.toml'} --data.path FOLDER")


def _to_hf(arguments: argparse.Namespace) -> None:
    from distmoe.convert.to_hf import export_model

    files = export_model(
        find_checkpoints(arguments.checkpoint, "CHECKPOINT")[-1],
        arguments.out,
        like=arguments.like,
        model_type=arguments.model_type,
        dtype=arguments.dtype,
        max_bytes=round(arguments.max_gib * GIB),
    )
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")


def _build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="distmoe convert", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    own = commands.add_parser("from-hf", help="safetensors -> a checkpoint and its settings")
    own.add_argument("model", type=Path, metavar="MODEL_DIR")
    own.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder")
    own.set_defaults(run=_from_hf)
    own = commands.add_parser("to-hf", help="a checkpoint -> safetensors and config.json")
    own.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="or a run: its newest")
    own.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder")
    own.add_argument(
        "--like",
        type=Path,
        metavar="MODEL_DIR",
        help="a model whose tokenizer and other keys of config.json to take",
    )
    own.add_argument("--model-type", default="", choices=list(ARCHITECTURES))
    own.add_argument(
        "--dtype",
        default="",
        choices=["float32", "bfloat16", "float16"],
        help="default: that of the imported model, else float32",
    )
    own.add_argument(
        "--max-gib",
        type=positive_number,
        default=5.0,
        metavar="N",
        help="largest file (default %(default)s)",
    )
    own.set_defaults(run=_to_hf)
    return parser
