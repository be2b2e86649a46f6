"""How many tokens' logits exist at one time."""

from __future__ import annotations

from distmoe.config.schema import Config

# Of a chunk: 2 GiB in fp32. Smaller chunks would add up the head's gradient more often, which moves
# 12 bytes of every weight: with 2,700 tokens about an eighth of the time of the head's products.
MOST_LOGITS = 1 << 29
# Rows of a chunk are a multiple of this, a tile of matrix products.
MULTIPLE = 128


def loss_chunk_tokens(config: Config, num_tokens: int) -> int:
    """Of a forward over ``num_tokens`` tokens: `train.loss_chunk_tokens`, or, where that is 0, as
    many as make the fewest equal chunks of at most MOST_LOGITS logits."""
    if config.train.loss_chunk_tokens:
        return config.train.loss_chunk_tokens
    chunks = max(1, -(-num_tokens * config.model.vocab_size // MOST_LOGITS))
    equal = -(-num_tokens // chunks)
    return equal if chunks == 1 else -(-equal // MULTIPLE) * MULTIPLE
