from collections.abc import Callable
from pathlib import Path

import pytest

from distmoe.config import check, load_config, resolve
from distmoe.metrics.flops import parameter_counts

CONFIGS = Path(__file__).parents[2] / "configs"
WORLDS = {"base": 1, "quickstart": 2, "one_gpu": 1, "eight_gpu": 8, "multi_node": 32}
WORLDS |= {"tiny": 2, "routing_quality": 4, "check_gpu": 1}
WORLDS |= {"olmoe_1b_7b": 8, "qwen3_30b_a3b": 32, "mixtral_8x7b": 32}
WORLDS |= {"deepseek_v2_lite": 32, "moonlight_16b_a3b": 32, "glm_4_5_air": 64}
WORLDS |= {"kimi_k2": 512}
WORLDS |= {"sonicmoe_1b4": 8, "sonicmoe_7b": 64, "sonicmoe_30b": 64, "sonicmoe_120b": 256}

# As published, to the unit; of the others, what the name says.
PARAMETERS = {
    "olmoe_1b_7b": (6_919_161_856, 0),
    "qwen3_30b_a3b": (30_532_122_624, 0),
    "mixtral_8x7b": (46_702_792_704, 0),
    "deepseek_v2_lite": (15_706_484_224, 0),
    "moonlight_16b_a3b": (16e9, 0.1e9),
    "glm_4_5_air": (106e9, 1e9),
    "kimi_k2": (1.04e12, 0.02e12),
    "sonicmoe_1b4": (1.4e9, 0.05e9),
    "sonicmoe_7b": (7e9, 0.5e9),
    "sonicmoe_30b": (30e9, 1e9),
    "sonicmoe_120b": (120e9, 1e9),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_example_is_right(path: Path, make_data: Callable[..., str]) -> None:
    folder = make_data(train=10**9, validation=10**8)
    check(load_config(path, ["--data.path", folder]), WORLDS[path.stem])


@pytest.mark.parametrize("name", PARAMETERS)
def test_model_has_its_published_size(name: str) -> None:
    config = resolve(load_config(CONFIGS / "models" / f"{name}.toml"), WORLDS[name])
    size, margin = PARAMETERS[name]
    assert abs(parameter_counts(config.model, config.moe).total - size) <= margin
