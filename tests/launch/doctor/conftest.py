from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from launch_doctor import Answers

from distmoe.config import RankInfo
from distmoe.launch.doctor.situation import Situation
from distmoe.metrics.nvml import all_gpus


@pytest.fixture
def situation() -> Callable[..., Situation]:
    """Makes one of a rank alone, without a run and a GPU; every field can be given."""

    def make(**fields: Any) -> Situation:
        base = Situation(
            config=None,
            world=1,
            local_world=1,
            ranks=RankInfo(),
            launcher_problem="",
            variables={},
            probes=Answers(),
            gpus=all_gpus,
        )
        return replace(base, **fields)

    return make
