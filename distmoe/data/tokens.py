"""One split of a prepared folder: random access to windows of its token stream."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmoe.data.manifest import check_files, read_manifest

HISTOGRAM_TOKENS = 1 << 24


class TokenSplit:
    """The shards of a split, memory-mapped and read as one stream of tokens.

    ValueError if the folder or the split is missing, or a file is not as long as the manifest says.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory = Path(directory)
        self.split = split
        self.manifest = read_manifest(directory)
        if split not in self.manifest.splits:
            known = ", ".join(self.manifest.splits)
            raise ValueError(f"{directory} has no split '{split}' (has: {known})")
        info = self.manifest.splits[split]
        check_files(self.directory, {split: info}, dtype=self.manifest.dtype)
        self.num_tokens = info.tokens
        self.vocab_size = self.manifest.vocab_size
        self.eod_id = self.manifest.eod_id
        self._names = [shard.name for shard in info.shards]
        self._shards = [
            np.memmap(self.directory / f"{name}.bin", self.manifest.token_dtype, mode="r")
            for name in self._names
        ]
        self._starts = np.array([0, *accumulate(s.tokens for s in info.shards)], np.int64)

    def num_samples(self, seq_len: int) -> int:
        """Windows of seq_len inputs, each with its next token."""
        return max(0, self.num_tokens - 1) // seq_len

    def sample(self, index: int, seq_len: int) -> NDArray[np.int64]:
        """Tokens [index * seq_len, (index + 1) * seq_len], both included: seq_len + 1 of them."""
        if not 0 <= index < self.num_samples(seq_len):
            raise IndexError(
                f"sample {index} of {self.num_samples(seq_len)} in split '{self.split}'"
            )
        return self.read(index * seq_len, seq_len + 1)

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """``count`` tokens of the stream from ``start`` on, across shards. ValueError, naming the
        place, for an id that is not in the vocabulary."""
        tokens = np.empty(count, np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            local = start + done - int(self._starts[shard])
            run = self._shards[shard][local : local + count - done]
            tokens[done : done + len(run)] = run
            if len(run) and run.max() >= self.vocab_size:
                raise ValueError(self._damage(shard, local, run))
            done += len(run)
            shard += 1
        return tokens

    def _damage(self, shard: int, local: int, run: NDArray[Any]) -> str:
        place = local + int((run >= self.vocab_size).argmax())
        return (
            f"{self.directory / self._names[shard]}.bin is damaged: at byte "
            f"{place * run.itemsize}, token {place}, it has the id {self._shards[shard][place]}, "
            f"and the vocabulary has {self.vocab_size}"
        )

    def token_shares(self) -> NDArray[np.float64]:
        """How often each token of the vocabulary occurs, as a share of all, [vocab_size].
        ValueError, naming the place, for an id that is not in the vocabulary."""
        if self.num_tokens == 0:
            raise ValueError(f"{self.directory}: split '{self.split}' is empty")
        counts = np.zeros(self.vocab_size, np.int64)
        for number, shard in enumerate(self._shards):
            for start in range(0, len(shard), HISTOGRAM_TOKENS):
                block = shard[start : start + HISTOGRAM_TOKENS]
                if block.max() >= self.vocab_size:
                    raise ValueError(self._damage(number, start, block))
                counts += np.bincount(block, minlength=self.vocab_size)
        return counts / self.num_tokens


def unigram_entropy(share_V: NDArray[np.float64]) -> float:
    """Entropy of token frequencies, in nats per token: the loss of a model that knows them, and
    nothing of the context."""
    share = share_V[share_V > 0]
    return float(-(share * np.log(share)).sum())
