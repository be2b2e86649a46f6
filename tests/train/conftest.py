from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock
from training_runs import LONG, config_file, finish, start_cold

from distmoe.data.cli import main as data_main


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shakespeare"
    assert data_main(["prepare", "--builtin", "shakespeare", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def long_run(data: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The config of an unbroken LONG run of two ranks of this machine, one for all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "long"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            finish(start_cold(config_file(folder, data), *LONG))
    return folder / "config.toml"
