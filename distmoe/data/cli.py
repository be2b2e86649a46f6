"""`distmoe data prepare` and `inspect`. Exit code: 2 on wrong arguments, 1 on a failure, else 0."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from distmoe.arguments import Parser
from distmoe.config import Config
from distmoe.data.builtin import BUILTINS
from distmoe.data.inspect import inspect_folder, print_folder, print_json
from distmoe.data.inspect_mix import folders_of, mix_of, mix_table
from distmoe.data.manifest import Manifest
from distmoe.data.prepare import prepare
from distmoe.data.spec import END_OF_DOCUMENT, PrepareSpec, check_spec

EXAMPLES = """examples:
  distmoe data prepare --builtin shakespeare --out data/shakespeare
  distmoe data prepare corpus/ --out data/corpus --vocab-size 32768
  distmoe data prepare part-*.jsonl --out data/web --tokenizer tokenizer.json --text-key content
  distmoe data inspect data/web --verify
  distmoe data inspect data/web data/code
  distmoe data inspect mixed.toml --samples 3
"""


def main(argv: Sequence[str]) -> int:
    """Run `distmoe data ARGV`; returns the exit code."""
    parser = _build_parser()
    try:
        arguments = parser.parse_args(list(argv))
        prepares = arguments.command == "prepare"
        spec = _spec(arguments) if prepares else None
        folders, config = ([], None) if prepares else folders_of(arguments.inputs)
    except SystemExit as stop:
        return int(stop.code or 0)
    except ValueError as error:
        print(f"distmoe data {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    try:
        if spec is not None:
            _print_summary(spec.out, prepare(spec, Console(stderr=True)))
        else:
            _inspect(arguments, folders, config, Console())
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
    add("inputs", nargs="*", type=Path, metavar="INPUT", help="files, or folders of files")
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
    add("--text-key", default=defaults.text_key, help="JSONL key, table column (%(default)s)")
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
    add(
        "--workers",
        type=int,
        default=defaults.workers,
        metavar="N",
        help="processes that tokenize; the result is the same (default %(default)s)",
    )
    add("--force", action="store_true", help="redo the work, whatever the folder holds")


def _build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="distmoe data", epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare_help = "turn text into tokenized shards; the same command goes on after a stop"
    add_prepare_arguments(
        commands.add_parser("prepare", help=prepare_help, epilog=EXAMPLES, formatter_class=raw)
    )
    _add_inspect_arguments(commands.add_parser("inspect", help="show what prepared folders hold"))
    return parser


def _add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="DIR", help="folders, or the TOML file of a run"
    )
    parser.add_argument("--verify", action="store_true", help="read all bytes, check all hashes")
    parser.add_argument(
        "--samples",
        type=_count,
        default=1,
        metavar="N",
        help="documents of each split to show (default %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number, at least 0")
    return count


def _inspect(
    arguments: argparse.Namespace, folders: list[Path], config: Config | None, console: Console
) -> None:
    reports, problems = [], []
    for folder in folders:
        try:
            report = inspect_folder(folder, samples=arguments.samples, verify=arguments.verify)
        except ValueError as error:
            problems.append(str(error))
        else:
            reports.append(report)
    if problems:
        raise ValueError("\n".join(problems))
    mix = mix_of(reports, config) if len(reports) > 1 else []
    if arguments.json:
        print_json(reports, mix, console)
        return
    for report in reports:
        print_folder(report, console)
    if mix:
        console.print(mix_table(mix, config))


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
        workers=arguments.workers,
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
