"""The prepared data against the settings: it is there, long enough, and fits the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config.data_sizes import read_data_sizes
from distmoe.config.errors import ConfigError
from distmoe.config.schema import Config


def data_problems(config: Config) -> Iterator[str]:
    """What is wrong with the folder data.path, a line each."""
    try:
        sizes = read_data_sizes(config.data.path)
    except ConfigError as error:
        yield from error.problems
        return
    if config.model.vocab_size < sizes.vocab_size:
        yield (
            f"model.vocab_size is {config.model.vocab_size}; it must be 0 or at least the "
            f"{sizes.vocab_size} tokens of the tokenizer in {config.data.path}"
        )
    yield from _too_short(config, "training", sizes.train_tokens, global_batches=1)
    yield from _too_short(
        config,
        "validation",
        sizes.validation_tokens,
        global_batches=config.train.validation_batches,
    )


def _too_short(config: Config, split: str, tokens: int, *, global_batches: int) -> Iterator[str]:
    needed = global_batches * config.train.global_batch_size
    # A sample is seq_len inputs and the token after them, which begins the next sample.
    samples = max(0, tokens - 1) // config.data.seq_len
    if samples < needed:
        factor = "train.validation_batches * " if split == "validation" else ""
        yield (
            f"data.path is '{config.data.path}'; its {split} split has {samples} sequences of "
            f"data.seq_len ({config.data.seq_len}) and {factor}train.global_batch_size needs "
            f"{needed}; prepare more text, or lower one of these"
        )
