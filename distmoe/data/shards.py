"""Writes the shards of one split. A shard has its final name only when it is complete."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from distmoe.data.files import UNFINISHED
from distmoe.data.manifest import Shard


class ShardWriter:
    """Appends documents; a shard ends with the document that brings it to ``shard_tokens``.

    A document never straddles two shards, so a shard may be longer than ``shard_tokens``.
    """

    def __init__(
        self, directory: Path, split: str, *, shard_tokens: int, eod_id: int, first_shard: int
    ) -> None:
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._eod_id = eod_id
        self._number = first_shard
        self._file: BinaryIO | None = None
        self._starts = [0]
        self._tokens = 0
        self._hash = hashlib.sha256()

    @property
    def name(self) -> str:
        """Name of the shard that is being written."""
        return f"{self._split}-{self._number:05d}"

    def append(self, ids: np.ndarray, last: bool) -> Shard | None:
        """Add ids to the open document; the last ones close it, unless it is empty.

        Returns the shard that this finished, if it did.
        """
        self._write(ids)
        if last and self._tokens > self._starts[-1]:
            self._write(np.array([self._eod_id], ids.dtype))
            self._starts.append(self._tokens)
            if self._tokens >= self._shard_tokens:
                return self.finish()
        return None

    def finish(self) -> Shard | None:
        """Complete the shard under its final name; None if nothing was written."""
        if self._file is None:
            return None
        if self._tokens != self._starts[-1]:
            raise AssertionError(f"{self.name} ends inside a document")
        index = np.array(self._starts, "<u8").tobytes()
        with open(self._part(".idx"), "wb") as file:
            file.write(index)
            _sync(file)
        _sync(self._file)
        size = self._file.tell()
        self.close()
        for suffix in (".idx", ".bin"):
            os.replace(self._part(suffix), self._directory / f"{self.name}{suffix}")
        shard = Shard(
            name=self.name,
            tokens=self._tokens,
            documents=len(self._starts) - 1,
            bytes=size,
            sha256=self._hash.hexdigest(),
        )
        self._number += 1
        self._starts, self._tokens, self._hash = [0], 0, hashlib.sha256()
        return shard

    def close(self) -> None:
        """Leave an unfinished shard behind under its unfinished name."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        if self._file is None:
            self._file = open(self._part(".bin"), "wb")
        data = ids.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._tokens += len(ids)

    def _part(self, suffix: str) -> Path:
        return self._directory / f"{self.name}{suffix}{UNFINISHED}"


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
