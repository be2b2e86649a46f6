"""How long the documents of a split are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distmoe.data.manifest import Split


@dataclass(frozen=True)
class LengthBin:
    """Documents of ``low`` to ``high`` tokens, both included, with the end-of-document token."""

    low: int
    high: int
    documents: int
    tokens: int


@dataclass(frozen=True)
class Lengths:
    """Of all documents of a split; zeros if it has none. ``bins``: by powers of two."""

    shortest: int
    longest: int
    mean: float
    bins: tuple[LengthBin, ...]


def document_lengths(directory: Path, split: Split) -> Lengths:
    """Lengths from the shards' offsets, one shard in memory at a time."""
    documents, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
    shortest, longest = [], []
    for shard in split.shards:
        lengths = np.diff(np.fromfile(directory / f"{shard.name}.idx", "<u8").astype(np.int64))
        # Of n the power of two that is at most n; exact, as a length is below 2^53.
        powers = np.frexp(lengths)[1] - 1
        documents += np.bincount(powers, minlength=64)
        tokens += np.bincount(powers, weights=lengths, minlength=64).astype(np.int64)
        shortest.append(int(lengths.min()))
        longest.append(int(lengths.max()))
    return Lengths(
        shortest=min(shortest, default=0),
        longest=max(longest, default=0),
        mean=split.tokens / split.documents if split.documents else 0.0,
        bins=tuple(
            LengthBin(1 << power, (2 << power) - 1, int(documents[power]), int(tokens[power]))
            for power in np.flatnonzero(documents).tolist()
        ),
    )
