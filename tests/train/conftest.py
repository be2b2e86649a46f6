from __future__ import annotations

from pathlib import Path

import pytest

from distmoe.data.cli import main as data_main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    assert data_main(["prepare", "--builtin", "shakespeare", "--out", str(folder)]) == 0
    return folder
