from pathlib import Path

import pytest
from manifests import write_manifest


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run of one rank with data, right in every setting."""
    write_manifest(tmp_path)
    path = tmp_path / "run.toml"
    path.write_text(f'[data]\npath = "{tmp_path}"\n[run]\ndir = "{tmp_path}/run"\n')
    return path


@pytest.fixture(autouse=True)
def _no_local_rank_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands export it, and a mesh of a later test would read it."""
    monkeypatch.setenv("LOCAL_RANK", "")
    monkeypatch.delenv("LOCAL_RANK")
