"""What a prepared folder holds, as tables for people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from distmoe.data.manifest import TOKENIZER_NAME, Manifest, check_files, read_manifest
from distmoe.data.tokenizer import Encoder

FIRST_TOKENS = 48


def first_text(directory: Path, manifest: Manifest, *, split: str, tokens: int) -> str:
    """The first tokens of a split, decoded; empty if the split is."""
    shards = manifest.splits[split].shards
    if not shards:
        return ""
    path = directory / f"{shards[0].name}.bin"
    ids = np.fromfile(path, manifest.token_dtype, count=tokens)
    tokenizer_json = (directory / TOKENIZER_NAME).read_text(encoding="utf-8")
    return Encoder(tokenizer_json, manifest.eod_token).decode(ids.tolist())


def inspect(directory: Path, console: Console, *, as_json: bool = False) -> None:
    """Print the manifest and the first text of each split.

    ValueError if the folder is not complete or a shard has not the size that it should have.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest.splits, dtype=manifest.dtype)
    texts = {
        split: first_text(directory, manifest, split=split, tokens=FIRST_TOKENS)
        for split in manifest.splits
    }
    if as_json:
        report = {**asdict(manifest), "first_text": texts}
        console.file.write(json.dumps(report, indent=2) + "\n")
        return
    console.print(_settings_table(directory, manifest))
    console.print(_splits_table(manifest))
    for split, text in texts.items():
        console.print(f"first {FIRST_TOKENS} tokens of {split}:", style="bold", highlight=False)
        console.print(text, markup=False, highlight=False)


def _settings_table(directory: Path, manifest: Manifest) -> Table:
    table = Table("key", title=str(directory), title_justify="left")
    table.add_column("value", overflow="fold")
    table.add_row("vocab_size", str(manifest.vocab_size))
    table.add_row("dtype", manifest.dtype)
    table.add_row("end of document", f"{manifest.eod_token} ({manifest.eod_id})")
    table.add_row("tokenizer sha256", manifest.tokenizer_sha256)
    table.add_row("source files", str(len(manifest.sources)))
    table.add_row("source bytes", f"{manifest.totals.source_bytes:,}")
    for key, value in manifest.settings.items():
        if value is not None and key not in ("eod_token", "vocab_size", "tokenizer_sha256"):
            table.add_row(key, str(value))
    return table


def _splits_table(manifest: Manifest) -> Table:
    table = Table("split", title="splits", title_justify="left")
    for name in ("tokens", "documents", "shards", "tokens/document"):
        table.add_column(name, justify="right")
    for name, split in manifest.splits.items():
        mean = split.tokens / split.documents if split.documents else 0.0
        table.add_row(
            name,
            f"{split.tokens:,}",
            f"{split.documents:,}",
            str(len(split.shards)),
            f"{mean:,.1f}",
        )
    return table
