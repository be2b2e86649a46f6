"""Every way to lay a job out over its ranks that the config's own checks allow.

What the user gave as an option stays; the other settings of `FREE` are tried. Groups that nodes
would cut unevenly are left out, unless they were given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import product
from typing import Any

from distmoe.config import Config, ConfigError, check, resolve
from distmoe.config.keys import value_of, with_values

FREE = (
    "parallel.engine",
    "parallel.ep",
    "parallel.dp_shard",
    "parallel.dp_replicate",
    "parallel.reshard_after_forward",
    "deepspeed.zero_stage",
    "train.micro_batch_size",
    "train.activation_checkpoint",
)
MOST_SEQUENCES = 16
"""Of a micro-batch that is tried."""
RECOMPUTE = ("none", "selective", "full")


def layouts(
    config: Config, world: int, *, ranks_per_node: int, pinned: Collection[str]
) -> Iterator[Config]:
    """Resolved configs, each possible. ``pinned``: keys that keep the value of ``config``."""
    for layout in _tried(config, world, ranks_per_node, pinned):
        if not problems_of(layout, world, ranks_per_node):
            yield resolve(layout, world, local_world=ranks_per_node)


def obstacles(
    config: Config, world: int, *, ranks_per_node: int, pinned: Collection[str]
) -> list[str]:
    """Why `layouts` finds nothing: the problems of the layout that has the fewest."""
    found = (
        problems_of(layout, world, ranks_per_node)
        for layout in _tried(config, world, ranks_per_node, pinned)
    )
    return min(found, key=len)


def problems_of(config: Config, world: int, ranks_per_node: int) -> list[str]:
    """Why a layout is impossible; the data need not be there yet."""
    try:
        check(config, world, local_world=ranks_per_node, with_data=False)
    except ConfigError as error:
        return error.problems
    return []


def differing(config: Config, other: Config, keys: Collection[str] = FREE) -> dict[str, Any]:
    """The values of ``other`` where it is not as ``config``."""
    return {
        key: value_of(other, key) for key in keys if value_of(other, key) != value_of(config, key)
    }


def _tried(
    config: Config, world: int, ranks_per_node: int, pinned: Collection[str]
) -> Iterator[Config]:
    """Layouts, possible or not."""
    for values in _cuts(config, world, ranks_per_node, pinned):
        cut = with_values(config, values)
        for more in _variants(cut, pinned):
            yield with_values(cut, more)


def _cuts(
    config: Config, world: int, ranks_per_node: int, pinned: Collection[str]
) -> Iterator[Mapping[str, Any]]:
    """Engine, axes and micro-batch."""
    engines = ("single",) if world == 1 else ("fsdp2", "deepspeed")
    moe_layers = config.model.n_layers - config.model.n_dense_layers
    experts = config.moe.num_experts if moe_layers else 1
    per_rank = max(1, config.train.global_batch_size * config.parallel.cp // world)
    axes: dict[str, list[Any]] = {
        "parallel.engine": list(engines),
        "parallel.ep": [n for n in _divisors(world) if experts % n == 0],
        "parallel.dp_replicate": _divisors(world),
        "train.micro_batch_size": [n for n in _divisors(per_rank) if n <= MOST_SEQUENCES],
    }
    if "parallel.dp_shard" in pinned and config.parallel.dp_shard:
        replicas, left = divmod(world, config.parallel.dp_shard)
        axes["parallel.dp_replicate"] = [1 if left else replicas]
    axes |= {key: [value_of(config, key)] for key in axes if key in pinned}
    sharding_given = {"parallel.dp_shard", "parallel.dp_replicate"} & set(pinned)
    for engine, ep, replicas, batch in product(*axes.values()):
        shards = world // replicas
        if (
            ("parallel.ep" in pinned or _fits(ep, ranks_per_node))
            and (sharding_given or _fits(shards, ranks_per_node))
            and (sharding_given or engine != "deepspeed" or replicas == 1)
        ):
            values = dict(zip(axes, (engine, ep, replicas, batch), strict=True))
            yield values | ({} if "parallel.dp_shard" in pinned else {"parallel.dp_shard": shards})


def _variants(config: Config, pinned: Collection[str]) -> Iterator[Mapping[str, Any]]:
    """What else may change, as the engine knows it."""
    axes: dict[str, tuple[Any, ...]] = {"train.activation_checkpoint": RECOMPUTE}
    if config.parallel.engine == "fsdp2" and config.parallel.dp_shard != 1:
        axes["parallel.reshard_after_forward"] = (True, False)
    if config.parallel.engine == "deepspeed":
        axes["deepspeed.zero_stage"] = (1, 2, 3)
    axes = {key: values for key, values in axes.items() if key not in pinned}
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _fits(size: int, ranks_per_node: int) -> bool:
    return size % ranks_per_node == 0 or ranks_per_node % size == 0
