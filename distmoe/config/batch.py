"""How a global batch is cut, of a resolved config."""

from __future__ import annotations

from distmoe.config.schema import Config


def data_ranks(config: Config, world: int) -> int:
    """Groups of ranks with sequences of their own: the ranks of a cp axis share theirs."""
    return world // config.parallel.cp


def micro_batches(config: Config, world: int) -> int:
    """Forwards of one rank in one optimizer step."""
    train = config.train
    return train.global_batch_size // (data_ranks(config, world) * train.micro_batch_size)


def rank_tokens(config: Config) -> int:
    """Tokens of one rank in one forward."""
    return config.train.micro_batch_size * config.data.seq_len // config.parallel.cp
