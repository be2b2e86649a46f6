"""What prepared folders hold, and what a mix of them is, as tables for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distmoe.data.lengths import Lengths, document_lengths
from distmoe.data.manifest import TOKENIZER_NAME, Manifest, Split, check_files, read_manifest
from distmoe.data.tokenizer import Encoder
from distmoe.data.verify import damage

SAMPLE_TOKENS = 48
BAR_WIDTH = 16


@dataclass(frozen=True)
class FolderReport:
    """``samples``: of each split, the first tokens of some documents. ``verified``: all bytes have
    been read, and are as they should be."""

    directory: Path
    manifest: Manifest
    lengths: dict[str, Lengths]
    samples: dict[str, list[str]]
    verified: bool

    def as_json(self) -> dict[str, Any]:
        """The manifest, and what was found out."""
        lengths = {split: asdict(found) for split, found in self.lengths.items()}
        found = {"lengths": lengths, "samples": self.samples, "verified": self.verified}
        return {**asdict(self.manifest), **found}


def inspect_folder(directory: Path, *, samples: int, verify: bool) -> FolderReport:
    """ValueError if the folder is not complete, or, with ``verify``, for anything that is wrong in
    it, a line each; without, for a shard that has not the size that it should have."""
    manifest = read_manifest(directory)
    if verify and (lines := list(damage(directory, manifest))):
        raise ValueError("\n".join(lines))
    check_files(directory, manifest.splits, dtype=manifest.dtype)
    return FolderReport(
        directory=directory,
        manifest=manifest,
        lengths={
            name: document_lengths(directory, split) for name, split in manifest.splits.items()
        },
        samples={
            name: sample_texts(directory, manifest, split=split, count=samples)
            for name, split in manifest.splits.items()
        },
        verified=verify,
    )


def sample_texts(directory: Path, manifest: Manifest, *, split: Split, count: int) -> list[str]:
    """The first tokens of documents, decoded: ``count`` of them, evenly over the split, from the
    first on."""
    tokenizer_json = (directory / TOKENIZER_NAME).read_text(encoding="utf-8")
    encoder = Encoder(tokenizer_json, manifest.eod_token)
    count = min(count, split.documents)
    texts = []
    for number in (split.documents * sample // count for sample in range(count)):
        for shard in split.shards:
            if number < shard.documents:
                break
            number -= shard.documents
        start, end = np.fromfile(directory / f"{shard.name}.idx", "<u8", 2, offset=8 * number)
        tokens = np.fromfile(
            directory / f"{shard.name}.bin",
            manifest.token_dtype,
            min(SAMPLE_TOKENS, int(end - start)),
            offset=int(start) * manifest.token_dtype.itemsize,
        )
        texts.append(encoder.decode(tokens.tolist()))
    return texts


def print_folder(report: FolderReport, console: Console) -> None:
    """Settings, splits, lengths and texts of one folder."""
    console.print(_settings_table(report))
    console.print(_splits_table(report))
    for split, lengths in report.lengths.items():
        if lengths.bins:
            console.print(_lengths_table(split, lengths))
    for split, texts in report.samples.items():
        for text in texts:
            title = f"a document of {split}, its first {SAMPLE_TOKENS} tokens:"
            console.print(title, style="bold", highlight=False)
            console.print(text, markup=False, highlight=False)


def print_json(
    reports: Sequence[FolderReport], mix: list[dict[str, Any]], console: Console
) -> None:
    """One folder as an object; several as {"folders": {...}, "mix": [...]}."""
    out: dict[str, Any] = reports[0].as_json()
    if len(reports) > 1:
        out = {"folders": {str(r.directory): r.as_json() for r in reports}, "mix": mix}
    console.file.write(json.dumps(out, indent=2) + "\n")


def _settings_table(report: FolderReport) -> Table:
    manifest = report.manifest
    table = Table("key", title=str(report.directory), title_justify="left")
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
    checked = "all hashes and tokens" if report.verified else "sizes of the files"
    table.add_row("checked", f"{checked}: as they should be")
    return table


def _splits_table(report: FolderReport) -> Table:
    table = Table("split", title="splits", title_justify="left")
    for name in ("tokens", "documents", "shards", "tokens/document", "shortest", "longest"):
        table.add_column(name, justify="right")
    for name, split in report.manifest.splits.items():
        lengths = report.lengths[name]
        table.add_row(
            name,
            f"{split.tokens:,}",
            f"{split.documents:,}",
            str(len(split.shards)),
            f"{lengths.mean:,.1f}",
            f"{lengths.shortest:,}",
            f"{lengths.longest:,}",
        )
    return table


def _lengths_table(split: str, lengths: Lengths) -> Table:
    table = Table(title=f"documents of {split} by length", title_justify="left")
    for name in ("tokens of a document", "documents", "tokens in all"):
        table.add_column(name, justify="right")
    table.add_column("share of all tokens")
    total = sum(each.tokens for each in lengths.bins)
    for each in lengths.bins:
        share = each.tokens / total
        table.add_row(
            f"{each.low:,} - {each.high:,}",
            f"{each.documents:,}",
            f"{each.tokens:,}",
            f"{share:6.1%} {'#' * round(BAR_WIDTH * share)}",
        )
    return table
