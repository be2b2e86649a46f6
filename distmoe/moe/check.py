"""What a layer cannot be, for those who build one without a checked config."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from distmoe.config import Config, MoEConfig, ParallelConfig
from distmoe.config.check import NAMES
from distmoe.config.keys import key_types, value_of
from distmoe.config.layer_rules import RULES
from distmoe.config.ranges import out_of_range
from distmoe.kernels.moe_mlp.activations import activation_called


def check_layer(config: MoEConfig, num_ranks: int, *, ranks_per_node: int) -> None:
    """ValueError that names the first setting with which ``num_ranks`` ranks cannot be a layer."""
    activation_called(config.activation)
    # Relations may divide by a number, so each must be in its range first: lazily, in this order.
    for problem in itertools.chain(
        _numbers(config),
        _choices(config),
        _relations(config, num_ranks, ranks_per_node),
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


def _relations(config: MoEConfig, num_ranks: int, ranks_per_node: int) -> Iterator[str]:
    """The rules of a run's config that concern a layer, in the words of one who has no run."""
    if config.hidden_size < 1:
        yield f"hidden_size is {config.hidden_size}; it must be at least 1"
    parallel = ParallelConfig(ep=num_ranks, ranks_per_node=ranks_per_node)
    for rule in RULES:
        if rule.of_layer:
            for problem in rule.complaints(Config(moe=config, parallel=parallel), num_ranks):
                yield problem.replace("moe.", "").replace("parallel.", "")
