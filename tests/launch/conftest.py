import json
from pathlib import Path

import pytest


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run of one rank with data, right in every setting."""
    splits = {"train": {"tokens": 100_000}, "validation": {"tokens": 100_000}}
    manifest = {"vocab_size": 512, "splits": splits, "tokenizer_sha256": "0" * 64, "eod_id": 0}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\npath = "{tmp_path}"\n[run]\ndir = "{tmp_path}/run"\n')
    return path
