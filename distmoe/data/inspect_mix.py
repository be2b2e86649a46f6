"""Several folders side by side: what a mix of them reads, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distmoe.config import Config, Corpus, corpora, load_config
from distmoe.data.inspect import FolderReport


def folders_of(inputs: Sequence[Path]) -> tuple[list[Path], Config | None]:
    """The folders to look at: those given, or those of one config, which is given back as well.

    ConfigError for a config that cannot be read; ValueError for a config among other inputs.
    """
    configs = [path for path in inputs if path.suffix == ".toml"]
    if not configs:
        return list(inputs), None
    if len(inputs) > 1:
        raise ValueError(f"'{configs[0]}' is a config; it must be the only input")
    config = load_config(configs[0])
    return [Path(corpus.path) for corpus in corpora(config.data)], config


def mix_of(reports: Sequence[FolderReport], config: Config | None) -> list[dict[str, Any]]:
    """Of each folder its tokens and its share of them; with a config also its weight, and its
    epochs in train.steps. ValueError if the folders have different tokenizers."""
    first = reports[0]
    for report in reports:
        if report.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise ValueError(
                f"'{report.directory}' has another tokenizer than '{first.directory}'; "
                "folders of one mix must have the same"
            )
    total = sum(report.manifest.splits["train"].tokens for report in reports)
    weights: Sequence[Corpus | None] = [None] * len(reports)
    if config is not None:
        weights = corpora(config.data)
    return [
        _row(report, corpus, config, total) for report, corpus in zip(reports, weights, strict=True)
    ]


def _row(
    report: FolderReport, corpus: Corpus | None, config: Config | None, total: int
) -> dict[str, Any]:
    tokens = report.manifest.splits["train"].tokens
    row = {"folder": str(report.directory), "train_tokens": tokens, "share": tokens / total}
    if corpus is not None and config is not None:
        read = config.train.steps * config.train.global_batch_size * config.data.seq_len
        row |= {"weight": corpus.weight, "epochs": read * corpus.weight / tokens}
    return row


def mix_table(mix: list[dict[str, Any]], config: Config | None) -> Table:
    """The rows of `mix_of` for people."""
    table = Table("folder", title="the mix", title_justify="left")
    for name in ("training tokens", "share of all"):
        table.add_column(name, justify="right")
    if config is not None:
        table.add_column("weight", justify="right")
        table.add_column("epochs", justify="right")
        table.title = f"the mix, read for {config.train.steps} steps"
    for row in mix:
        cells = [row["folder"], f"{row['train_tokens']:,}", f"{row['share']:.1%}"]
        if config is not None:
            cells += [f"{row['weight']:.4g}", f"{row['epochs']:.3g}"]
        table.add_row(*cells)
    return table
