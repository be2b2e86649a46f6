"""The complaints of a check."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from distmoe.config import Config, ConfigError, check

MakeConfig = Callable[..., Config]
MakeData = Callable[..., str]


def problems(config: Config, world: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(config, world)
    return caught.value.problems
