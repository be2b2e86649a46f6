from collections.abc import Callable
from pathlib import Path

import pytest

from distmoe.config import check, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
WORLDS = {"base": 1, "quickstart": 2, "one_gpu": 1, "eight_gpu": 8, "multi_node": 32}
WORLDS["routing_quality"] = 4


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_example_is_right(path: Path, make_data: Callable[..., str]) -> None:
    folder = make_data(train=10**9, validation=10**8)
    check(load_config(path, ["--data.path", folder]), WORLDS[path.stem])
