"""The same split of several prepared folders as one: samples are numbered folder after folder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distmoe.data.tokens import TokenSplit


class Samples(Protocol):
    """What batches are made of: the split of one folder, or of several."""

    split: str
    eod_id: int

    def num_samples(self, seq_len: int) -> int:
        """Windows of seq_len inputs, each with its next token."""

    def sample(self, index: int, seq_len: int) -> NDArray[np.int64]:
        """The seq_len + 1 tokens of a window."""


class JoinedSplits:
    """Splits of the same name; ValueError if they have not all the same tokenizer and
    the same token at the end of a document."""

    def __init__(self, splits: Sequence[TokenSplit]) -> None:
        first = splits[0]
        for other in splits:
            if other.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
                raise ValueError(
                    f"data.mix has '{first.directory}' and '{other.directory}', which have "
                    "different tokenizers; all must have the same"
                )
            if other.eod_id != first.eod_id:
                raise ValueError(
                    f"data.mix has '{first.directory}' and '{other.directory}', whose documents "
                    f"end with the tokens {first.eod_id} and {other.eod_id}; all must have the same"
                )
        self.split, self.eod_id = first.split, first.eod_id
        self._splits = list(splits)

    def num_samples(self, seq_len: int) -> int:
        """Windows of all splits; none straddles two of them."""
        return sum(split.num_samples(seq_len) for split in self._splits)

    def sample(self, index: int, seq_len: int) -> NDArray[np.int64]:
        """The seq_len + 1 tokens of a window."""
        ends = list(accumulate(split.num_samples(seq_len) for split in self._splits))
        if not 0 <= index < ends[-1]:
            raise IndexError(f"sample {index} of {ends[-1]} in split '{self.split}'")
        number = int(np.searchsorted(ends, index, side="right"))
        return self._splits[number].sample(index - (ends[number - 1] if number else 0), seq_len)
