"""Manifests of prepared data, without the data."""

from __future__ import annotations

import json
from pathlib import Path


def write_manifest(
    folder: Path,
    *,
    vocab_size: int = 512,
    train: int = 100_000,
    validation: int = 100_000,
    tokenizer: str = "0" * 64,
    eod_id: int = 0,
) -> str:
    """``folder``, which is made, as a setting names it; ``train``, ``validation``: tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {"train": {"tokens": train}, "validation": {"tokens": validation}}
    manifest = {"vocab_size": vocab_size, "splits": splits, "eod_id": eod_id}
    manifest["tokenizer_sha256"] = tokenizer
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)
