"""`distmoe generate`: continue a text, for a quick look at what a run has learned.

Exit code: 2 for a wrong argument, 1 for a failure, else 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from distmoe.arguments import Parser, positive
from distmoe.checkpoint.find import find_checkpoints
from distmoe.checkpoint.load_model import load_model
from distmoe.checkpoint.manifest import damage, read_manifest
from distmoe.config import Config, corpora
from distmoe.config.dtype import with_dtype
from distmoe.data.manifest import TOKENIZER_NAME
from distmoe.data.spec import END_OF_DOCUMENT
from distmoe.engines import compute_dtype
from distmoe.model.generate import generate
from distmoe.runtime import pick_device


def main(argv: Sequence[str]) -> int:
    """Run `distmoe generate ARGV`; returns the exit code."""
    try:
        arguments = _build_parser().parse_args(list(argv))
        path = find_checkpoints(arguments.checkpoint, "CHECKPOINT")[-1]
        if lines := damage(path):
            raise ValueError(f"{path} is damaged: {'; '.join(lines)}")
    except SystemExit as stop:
        return int(stop.code or 0)
    except ValueError as error:
        print(f"distmoe generate: error: {error}", file=sys.stderr)
        return 2
    try:
        _print_text(path, arguments)
    except (ValueError, OSError) as error:
        print(f"distmoe generate: {error}", file=sys.stderr)
        return 1
    return 0


def _print_text(path: Path, arguments: argparse.Namespace) -> None:
    device = pick_device(arguments.device, 0)
    config, model = load_model(path, device)
    model.to(compute_dtype(with_dtype(config, device.type)))
    tokenizer = _tokenizer(path, config, arguments.tokenizer)
    prompt = tokenizer.encode(arguments.prompt, add_special_tokens=False).ids
    if not prompt:
        raise ValueError("--prompt is empty; it must have a token")
    print(arguments.prompt, end="", flush=True)
    tokens, shown = [], ""
    for token in generate(
        model,
        prompt,
        count=arguments.tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        stop=_stop_tokens(path, tokenizer),
    ):
        tokens.append(token)
        text = tokenizer.decode([*prompt, *tokens])[len(tokenizer.decode(prompt)) :]
        # A character may take several tokens.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()


def _tokenizer(path: Path, config: Config, named: Path | None) -> Tokenizer:
    """That of ``named``, else beside an imported checkpoint, else of the run's data."""
    beside = path.absolute().parents[1] / TOKENIZER_NAME
    # All corpora of a mix have the same.
    of_data = Path(corpora(config.data)[0].path) / TOKENIZER_NAME
    file = named or (beside if beside.is_file() else of_data)
    if not file.is_file():
        raise ValueError(f"there is no tokenizer '{file}'; name one with --tokenizer")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        raise ValueError(f"{file} is no tokenizer.json: {error}") from error


def _stop_tokens(path: Path, tokenizer: Tokenizer) -> set[int]:
    """The end of a document, or what the imported model calls the end of a sequence."""
    about = read_manifest(path).about
    end = about.get("hf_config", {}).get("eos_token_id")
    ends = end if isinstance(end, list) else [end, tokenizer.token_to_id(END_OF_DOCUMENT)]
    return {token for token in ends if token is not None}


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="distmoe generate",
        epilog="Routing is plain top-k, on one device; every token computes the text anew.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT|RUN")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--tokens", type=positive, default=64, metavar="N", help="at most")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.0, help="0: always the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    return parser


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' must be a number, at least 0")
    return value
