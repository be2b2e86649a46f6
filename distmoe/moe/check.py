"""What a layer cannot be, for those who build one without a checked config."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from distmoe.config import Config, MoEConfig, expert_group_problems
from distmoe.config.check import NAMES
from distmoe.config.keys import key_types, value_of
from distmoe.config.ranges import out_of_range
from distmoe.config.rules import KEY_UNIT
from distmoe.kernels.moe_mlp.activations import activation_called


def check_layer(config: MoEConfig, num_ranks: int, *, ranks_per_node: int) -> None:
    """ValueError that names the first setting with which ``num_ranks`` ranks cannot be a layer."""
    activation_called(config.activation)
    # Relations may divide by a number, so each must be in its range first: lazily, in this order.
    for problem in itertools.chain(
        _numbers(config),
        _choices(config),
        _relations(config, num_ranks),
        expert_group_problems(config, ep=num_ranks, ranks_per_node=ranks_per_node),
    ):
        raise ValueError(problem)


def _numbers(config: MoEConfig) -> Iterator[str]:
    for key, problem in out_of_range(Config(moe=config)):
        if key.startswith("moe."):
            yield problem.removeprefix("moe.")


def _choices(config: MoEConfig) -> Iterator[str]:
    allowed = {key: get_args(kind) for key, kind in key_types().items() if _is_choice(kind)}
    allowed |= {key: (*others, *registry) for key, (registry, others) in NAMES.items()}
    for key, names in allowed.items():
        if key.startswith("moe.") and value_of(Config(moe=config), key) not in names:
            value = value_of(Config(moe=config), key)
            yield f"{key.removeprefix('moe.')} is {value!r}; it must be one of {', '.join(names)}"


def _is_choice(kind: Any) -> bool:
    return get_origin(kind) is Literal


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
    if 0 < config.rounding.capacity_factor < 1:
        factor = config.rounding.capacity_factor
        yield f"rounding.capacity_factor is {factor}; it must be 0 or at least 1"
    if 0 < config.bias_update_rate < KEY_UNIT:
        yield (
            f"bias_update_rate is {config.bias_update_rate}; it must be 0 or at least {KEY_UNIT}, "
            "the unit of a bias"
        )
