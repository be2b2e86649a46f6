"""The few numbers of a prepared data folder that a config is checked against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from distmoe.config.errors import ConfigError


@dataclass(frozen=True)
class DataSizes:
    """Counts in the manifest of a prepared folder, the hash of its tokenizer, and the token that
    ends a document."""

    vocab_size: int
    tokenizer_sha256: str
    eod_id: int
    train_tokens: int
    validation_tokens: int


def read_data_sizes(folder: str, key: str = "data.path") -> DataSizes:
    """The counts of <folder>/manifest.json; ConfigError, which says that ``key`` names the folder,
    if it is missing or no manifest."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise ConfigError(
            f"{key} is '{folder}'; no manifest.json there; make one with: "
            f"distmoe data prepare INPUT --out {folder}"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return DataSizes(
            vocab_size=int(manifest["vocab_size"]),
            tokenizer_sha256=str(manifest["tokenizer_sha256"]),
            eod_id=int(manifest["eod_id"]),
            train_tokens=_tokens(manifest, "train"),
            validation_tokens=_tokens(manifest, "validation"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{key} is '{folder}'; its manifest.json cannot be read ({error!r}); make it again "
            "with: distmoe data prepare ... --force"
        ) from error


def _tokens(manifest: dict[str, dict[str, dict[str, int]]], split: str) -> int:
    """Tokens of a split; a split that the folder lacks has none."""
    return int(manifest["splits"].get(split, {"tokens": 0})["tokens"])
