"""What a layer cannot be, for those who build one without a checked config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args, get_origin, get_type_hints

from distmoe.config import Config, MoEConfig, expert_group_problems
from distmoe.config.ranges import out_of_range
from distmoe.config.rules import KEY_UNIT
from distmoe.kernels.moe_mlp.activations import activation_called


def check_layer(config: MoEConfig, num_ranks: int, *, ranks_per_node: int) -> None:
    """ValueError that names the first setting with which ``num_ranks`` ranks cannot be a layer."""
    activation_called(config.activation)
    # Relations may divide by a number, so each must be in its range first.
    for find in (_numbers, _choices, _relations):
        for problem in find(config, num_ranks):
            raise ValueError(problem)
    for problem in expert_group_problems(config, ep=num_ranks, ranks_per_node=ranks_per_node):
        raise ValueError(problem)


def _numbers(config: MoEConfig, num_ranks: int) -> Iterator[str]:
    for key, problem in out_of_range(Config(moe=config)):
        if key.startswith("moe."):
            yield problem.removeprefix("moe.")


def _choices(config: MoEConfig, num_ranks: int) -> Iterator[str]:
    for name, kind in get_type_hints(MoEConfig).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            allowed = ", ".join(get_args(kind))
            yield f"{name} is {getattr(config, name)!r}; it must be one of {allowed}"


def _relations(config: MoEConfig, num_ranks: int) -> Iterator[str]:
    groups = config.rounding.balance_groups or num_ranks
    if config.hidden_size < 1:
        yield f"hidden_size is {config.hidden_size}; it must be at least 1"
    if config.top_k > config.num_experts:
        yield f"top_k is {config.top_k}; it must be in 1..num_experts ({config.num_experts})"
    if config.num_experts % num_ranks:
        yield f"num_experts is {config.num_experts}; the {num_ranks} ranks must divide it"
    if config.num_experts % groups:
        yield (
            f"rounding.balance_groups is {groups}; it must divide num_experts "
            f"({config.num_experts})"
        )
    if 0 < config.bias_update_rate < KEY_UNIT:
        yield (
            f"bias_update_rate is {config.bias_update_rate}; it must be 0 or at least {KEY_UNIT}, "
            "the unit of a bias"
        )
