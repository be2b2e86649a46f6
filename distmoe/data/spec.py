"""The settings of a preparation. They are checked before anything is read or written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmoe.data.sources import find_sources

END_OF_DOCUMENT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-document token."""


@dataclass(frozen=True)
class PrepareSpec:
    """What to prepare, and how."""

    inputs: tuple[Path, ...]
    """.txt, .jsonl (also .gz, .xz, .zst), .parquet and .arrow files, or folders of them."""
    out: Path
    tokenizer: Path | None = None
    """A tokenizer.json. None: train a byte-level BPE."""
    vocab_size: int = 16384
    """Tokens of a trained tokenizer, at most."""
    eod_token: str = END_OF_DOCUMENT
    """Token that ends a document."""
    text_key: str = "text"
    """Key of a JSONL record, or column of a table, that holds the text."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out, in [0, 0.5]."""
    shard_tokens: int = 100_000_000
    """A shard ends with the document that brings it to this many tokens."""
    seed: int = 1
    """Of the choice of held-out documents."""
    workers: int = 1
    """Processes that tokenize. 1: this one does; its tokenizer uses all cores."""
    force: bool = False
    """Redo the work, whatever the folder holds."""


def check_spec(spec: PrepareSpec) -> None:
    """ValueError that names the argument, its value and what is allowed."""
    if not 0 <= spec.validation_fraction <= 0.5:
        raise ValueError(f"--validation-fraction is {spec.validation_fraction}; allowed: 0 to 0.5")
    if spec.workers < 1:
        raise ValueError(f"--workers is {spec.workers}; it must be at least 1")
    if spec.shard_tokens < 1:
        raise ValueError(f"--shard-tokens is {spec.shard_tokens}; it must be at least 1")
    if spec.tokenizer is None and spec.vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size is {spec.vocab_size}; it must be at least {SMALLEST_VOCABULARY}"
        )
    if spec.tokenizer is None and spec.eod_token != END_OF_DOCUMENT:
        raise ValueError(f"--eod-token is '{spec.eod_token}'; it needs --tokenizer")
    if spec.tokenizer is not None and not spec.tokenizer.is_file():
        raise ValueError(f"--tokenizer is '{spec.tokenizer}'; there is no such file")
    if spec.out.exists() and not spec.out.is_dir():
        raise ValueError(f"--out is '{spec.out}'; it is not a folder")
    find_sources(spec.inputs)
