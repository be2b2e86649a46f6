"""Fill in the settings that follow from others, those that are 0 or "auto" in a file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from distmoe.config.corpora import corpora
from distmoe.config.data_sizes import read_data_sizes
from distmoe.config.errors import ConfigError
from distmoe.config.keys import value_of, with_values
from distmoe.config.model_schema import ModelConfig
from distmoe.config.schema import Config

_UNSET = (0, "auto")


def resolve(config: Config, world: int | None = None, *, local_world: int | None = None) -> Config:
    """``config`` with every derived value for a run of ``world`` ranks (launch.nproc by default).

    ``local_world``: ranks of this machine, as the launcher reports them. None: nobody did; only
    launch.nproc ranks are then known to share a machine.

    A value that cannot be derived stays unset, and `check` says why. moe.kernel, the exchange,
    the device and the dtype (see `with_dtype`) stay "auto": they depend on the machine.
    """
    world = world or config.launch.nproc
    if local_world is None:
        local_world = world if world == config.launch.nproc else 0
    derived = dict(_derived(config, world, local_world))
    return with_values(
        config, {key: value for key, value in derived.items() if value_of(config, key) in _UNSET}
    )


def _derived(config: Config, world: int, local_world: int) -> Iterator[tuple[str, Any]]:
    yield "moe.hidden_size", config.model.hidden_size
    yield "model.head_dim", _head_dim(config.model)
    yield "model.vocab_size", _vocab_size(config)
    yield "parallel.dp_shard", _quotient(world, config.parallel.dp_replicate)
    yield "parallel.ranks_per_node", local_world
    yield "parallel.engine", "single" if world == 1 else "fsdp2"
    sequences = config.train.global_batch_size * config.parallel.cp
    yield "train.micro_batch_size", _quotient(sequences, world)


def _head_dim(model: ModelConfig) -> int:
    if model.attention == "mla":
        return model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim
    return _quotient(model.hidden_size, model.n_heads)


def _quotient(total: int, parts: int) -> int:
    """total / parts, or 0 (unset) where that is no positive integer."""
    return total // parts if parts > 0 and total > 0 and total % parts == 0 else 0


def _vocab_size(config: Config) -> int:
    try:
        return read_data_sizes(corpora(config.data)[0].path).vocab_size
    except ConfigError:
        return 0
