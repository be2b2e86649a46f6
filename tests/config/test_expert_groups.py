"""Limits of a token's choice to groups of experts, or to nodes."""

from __future__ import annotations

import pytest
from config_problems import MakeConfig

from distmoe.config import ConfigError, MoEConfig, check, expert_group_problems
from distmoe.config.layer_rules import FORCED_ROUTERS
from distmoe.registry import ROUTERS
from distmoe.routing.routers import is_forced


@pytest.mark.parametrize(
    "options",
    [
        "--moe.expert_groups=4 --moe.groups_per_token=2",
        "--moe.expert_groups=1",
        "--moe.nodes_per_token=2 --parallel.ranks_per_node=2",
        # One node, or no more than a token may use: no limit, whatever top_k is.
        "--moe.nodes_per_token=1 --parallel.ranks_per_node=16",
        "--moe.nodes_per_token=8 --parallel.ranks_per_node=1 --moe.top_k=16",
        "--moe.router=balanced --moe.expert_groups=4 --moe.groups_per_token=1",
        "--moe.router=hash --moe.score_scale=2.5",
        "--moe.router=sigmoid_topk --moe.bias_update_rate=1e-3",
    ],
)
def test_limits_that_fit(make_config: MakeConfig, options: str) -> None:
    check(make_config(*options.split(), "--parallel.ep=8"), 8)


def test_the_check_knows_every_forced_router() -> None:
    assert set(FORCED_ROUTERS) == {name for name in ROUTERS if is_forced(name)}


def test_ranks_of_a_node_are_those_of_the_launcher(make_config: MakeConfig) -> None:
    config = make_config("--parallel.ep=8", "--moe.nodes_per_token=1")
    check(config, 8, local_world=8)
    check(config, 8, local_world=4)
    with pytest.raises(ConfigError, match="ranks_per_node is 3; it must divide"):
        check(config, 8, local_world=3)


def test_a_balanced_run_of_experts_touches_as_many_groups_as_the_rule_says() -> None:
    for num_experts, count, top_k in ((16, 4, 3), (12, 4, 2), (24, 3, 5), (16, 8, 4), (18, 6, 7)):
        size = num_experts // count
        most = max(
            len({(t * top_k + j) % num_experts // size for j in range(top_k)})
            for t in range(num_experts)
        )
        for per_token in range(1, count):
            moe = MoEConfig(
                num_experts=num_experts,
                top_k=top_k,
                router="balanced",
                expert_groups=count,
                groups_per_token=per_token,
            )
            found = list(expert_group_problems(moe, ep=1, ranks_per_node=0))
            assert any("balanced" in problem for problem in found) == (per_token < most)
