"""Every byte of a prepared folder against its manifest and against the rules of the format."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distmoe.data.files import sha256_of_file
from distmoe.data.manifest import TOKENIZER_NAME, Manifest, Shard, check_shard

BLOCK_TOKENS = 1 << 24


def damage(directory: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong, a line each, which names the file and, inside of it, the byte."""
    tokenizer = directory / TOKENIZER_NAME
    if not tokenizer.is_file():
        yield f"{tokenizer} is missing"
    elif sha256_of_file(tokenizer) != manifest.tokenizer_sha256:
        yield f"{tokenizer} has another sha256 than its manifest says"
    for split in manifest.splits.values():
        for shard in split.shards:
            try:
                check_shard(directory, shard, dtype=manifest.dtype)
            except ValueError as error:
                yield str(error)
            else:
                yield from _shard_damage(directory, manifest, shard)


def _shard_damage(directory: Path, manifest: Manifest, shard: Shard) -> Iterator[str]:
    index, data = directory / f"{shard.name}.idx", directory / f"{shard.name}.bin"
    if sha256_of_file(data) != shard.sha256:
        yield f"{data} has another sha256 than its manifest says"
    offsets = np.fromfile(index, "<u8").astype(np.int64)
    if (entry := _wrong_offset(offsets, shard.tokens)) is not None:
        yield (
            f"{index} is damaged: at byte {8 * entry}, entry {entry}, it has {offsets[entry]}; "
            f"entries rise from 0 to the {shard.tokens} tokens of the shard"
        )
        return
    ends = offsets[1:] - 1
    tokens = np.memmap(data, manifest.token_dtype, mode="r")
    for start in range(0, shard.tokens, BLOCK_TOKENS):
        block = tokens[start : start + BLOCK_TOKENS]
        here = ends[(ends >= start) & (ends < start + len(block))] - start
        if (place := _wrong_token(block, here, manifest)) is not None:
            yield (
                f"{data} is damaged: at byte {(start + place) * tokens.itemsize}, token "
                f"{start + place}, it has the id {block[place]}; the vocabulary has "
                f"{manifest.vocab_size}, and {manifest.eod_id} stands at the end of each document "
                "and nowhere else"
            )
            return


def _wrong_offset(offsets: NDArray[np.int64], tokens: int) -> int | None:
    """The first entry that cannot be."""
    if offsets[0] != 0:
        return 0
    falls = np.flatnonzero((np.diff(offsets) <= 0) | (offsets[1:] > tokens))
    if len(falls):
        return int(falls[0]) + 1
    return None if offsets[-1] == tokens else len(offsets) - 1


def _wrong_token(block: NDArray[Any], ends: NDArray[np.int64], manifest: Manifest) -> int | None:
    """The first token that cannot be, where documents end at ``ends``."""
    is_end = np.zeros(len(block), bool)
    is_end[ends] = True
    wrong = (block >= manifest.vocab_size) | ((block == manifest.eod_id) != is_end)
    return int(wrong.argmax()) if wrong.any() else None
