from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import LONG, config_file, finish, start_cold

from distmoe.data.cli import main as data_main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    assert data_main(["prepare", "--builtin", "shakespeare", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def long_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of an unbroken LONG run of two ranks of this machine."""
    config = config_file(tmp_path_factory.mktemp("long"), data)
    finish(start_cold(config, *LONG))
    return config
