from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from manifests import write_manifest

from distmoe.config import Config, apply_overrides

MakeData = Callable[..., str]
MakeConfig = Callable[..., Config]


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Writes a manifest with the given counts; gives the folder."""

    return partial(write_manifest, tmp_path)


@pytest.fixture
def make_config(make_data: MakeData) -> MakeConfig:
    """A config that is right for one rank, changed by options."""
    folder = make_data()

    def make(*options: str) -> Config:
        return apply_overrides(Config(), ["--data.path", folder, *options])

    return make
