import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distmoe.config import Config, apply_overrides

MakeData = Callable[..., str]
MakeConfig = Callable[..., Config]


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Writes a manifest with the given counts; gives the folder."""

    def make(vocab_size: int = 512, train: int = 100_000, validation: int = 100_000) -> str:
        splits = {"train": {"tokens": train}, "validation": {"tokens": validation}}
        manifest = {
            "vocab_size": vocab_size,
            "splits": splits,
            "tokenizer_sha256": "0" * 64,
            "eod_id": 0,
        }
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        return str(tmp_path)

    return make


@pytest.fixture
def make_config(make_data: MakeData) -> MakeConfig:
    """A config that is right for one rank, changed by options."""
    folder = make_data()

    def make(*options: str) -> Config:
        return apply_overrides(Config(), ["--data.path", folder, *options])

    return make
