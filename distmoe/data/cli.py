"""`distmoe data prepare` and `inspect`. Exit code: 2 on wrong arguments, 1 on a failure, else 0."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from distmoe.data.builtin import BUILTINS
from distmoe.data.inspect import inspect
from distmoe.data.manifest import Manifest
from distmoe.data.prepare import prepare
from distmoe.data.spec import END_OF_DOCUMENT, PrepareSpec, check_spec

EXAMPLES = """examples:
  distmoe data prepare --builtin shakespeare --out data/shakespeare
  distmoe data prepare corpus/ --out data/corpus --vocab-size 32768
  distmoe data prepare part-*.jsonl --out data/web --tokenizer tokenizer.json --text-key content
  distmoe data inspect data/web
"""


class _Parser(argparse.ArgumentParser):
    """An error is one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str]) -> int:
    """Run `distmoe data ARGV`; returns the exit code."""
    parser = _build_parser()
    try:
        arguments = parser.parse_args(list(argv))
        spec = _spec(arguments) if arguments.command == "prepare" else None
    except SystemExit as stop:
        return int(stop.code or 0)
    except ValueError as error:
        print(f"distmoe data prepare: error: {error}", file=sys.stderr)
        return 2
    try:
        if spec is not None:
            _print_summary(spec.out, prepare(spec, Console(stderr=True)))
        else:
            inspect(arguments.directory, Console(), as_json=arguments.json)
    except (ValueError, OSError) as error:
        print(f"distmoe data {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished shard", file=sys.stderr)
        return 1
    return 0


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `prepare`."""
    defaults = PrepareSpec(inputs=(), out=Path())
    add = parser.add_argument
    add("inputs", nargs="*", type=Path, metavar="INPUT", help=".txt, .jsonl, .parquet or a folder")
    add("--builtin", choices=sorted(BUILTINS), help="text and tokenizer that come with distmoe")
    add("--out", required=True, type=Path, metavar="DIR", help="folder of the data set")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; without it, one is trained")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help=f"tokens of the trained byte-level BPE, at most (default {defaults.vocab_size})",
    )
    add("--eod-token", default=END_OF_DOCUMENT, help="ends a document (default %(default)s)")
    add("--text-key", default=defaults.text_key, help="JSONL key, Parquet column (%(default)s)")
    add(
        "--validation-fraction",
        type=float,
        default=defaults.validation_fraction,
        metavar="F",
        help="share of the documents that is held out (default %(default)s)",
    )
    add(
        "--shard-tokens",
        type=int,
        default=defaults.shard_tokens,
        metavar="N",
        help="tokens of a shard, about (default %(default)s)",
    )
    add("--seed", type=int, default=defaults.seed, help="of the held-out choice (%(default)s)")
    add("--force", action="store_true", help="redo the work, whatever the folder holds")


def _build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="distmoe data", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_help = "turn text into tokenized shards; the same command goes on after a stop"
    add_prepare_arguments(
        commands.add_parser("prepare", help=prepare_help, epilog=EXAMPLES, formatter_class=raw)
    )
    inspect_parser = commands.add_parser("inspect", help="show what a prepared folder holds")
    inspect_parser.add_argument("directory", type=Path, metavar="DIR")
    inspect_parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _spec(arguments: argparse.Namespace) -> PrepareSpec:
    """The checked settings; ValueError for arguments that do not fit together."""
    inputs, tokenizer = tuple(arguments.inputs), arguments.tokenizer
    if arguments.builtin:
        if inputs or tokenizer or arguments.vocab_size is not None:
            raise ValueError("--builtin has its own text and tokenizer; leave out the others")
        inputs = (BUILTINS[arguments.builtin].text,)
        tokenizer = BUILTINS[arguments.builtin].tokenizer
    elif not inputs:
        raise ValueError("no INPUT; give files or folders, or --builtin shakespeare")
    elif tokenizer and arguments.vocab_size is not None:
        raise ValueError("--vocab-size is of a trained tokenizer; it cannot go with --tokenizer")
    vocab_size = {} if arguments.vocab_size is None else {"vocab_size": arguments.vocab_size}
    spec = PrepareSpec(
        inputs=inputs,
        out=arguments.out,
        tokenizer=tokenizer,
        eod_token=arguments.eod_token,
        text_key="text" if arguments.builtin else arguments.text_key,
        validation_fraction=arguments.validation_fraction,
        shard_tokens=arguments.shard_tokens,
        seed=arguments.seed,
        force=arguments.force,
        **vocab_size,
    )
    check_spec(spec)
    return spec


def _print_summary(directory: Path, manifest: Manifest) -> None:
    parts = [
        f"{name} {split.tokens:,} tokens in {split.documents:,} documents"
        for name, split in manifest.splits.items()
    ]
    print(f"{directory}: {', '.join(parts)}, vocabulary {manifest.vocab_size:,}")
