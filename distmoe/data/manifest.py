"""What a prepared data folder holds: manifest.json as frozen dataclasses.

Tokens of a shard lie in <name>.bin (little-endian, ``Manifest.dtype``), its document offsets in
<name>.idx (little-endian uint64, documents + 1 entries from 0 to the number of tokens).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distmoe.data.files import write_text

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Shard:
    """One pair of files: <name>.bin and <name>.idx."""

    name: str
    tokens: int
    documents: int
    bytes: int
    """Size of <name>.bin."""
    sha256: str
    """Of <name>.bin."""


@dataclass(frozen=True)
class Split:
    """The shards of one split, in the order of the token stream."""

    tokens: int
    documents: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Source:
    """One file that the tokens were made from."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Totals:
    """Sums over the splits and over the source files."""

    tokens: int
    documents: int
    source_bytes: int


@dataclass(frozen=True)
class Manifest:
    """A complete data set. It is written last, so a folder that has one is complete."""

    format_version: int
    dtype: str
    """uint16 or uint32."""
    vocab_size: int
    eod_token: str
    eod_id: int
    tokenizer_sha256: str
    splits: dict[str, Split]
    sources: tuple[Source, ...]
    totals: Totals
    settings: dict[str, Any]
    """What was asked for: seed, validation_fraction, shard_tokens, text_key ..."""

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """NumPy type of the tokens on disk."""
        return np.dtype(self.dtype).newbyteorder("<")


def token_dtype_name(vocab_size: int) -> str:
    """The smallest type that holds the ids 0 .. vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def make_split(shards: tuple[Shard, ...]) -> Split:
    """A split with the sums over its shards."""
    return Split(
        tokens=sum(shard.tokens for shard in shards),
        documents=sum(shard.documents for shard in shards),
        shards=shards,
    )


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write <directory>/manifest.json at once."""
    write_text(directory / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(directory: str | Path) -> Manifest:
    """The manifest of a prepared folder.

    ValueError if there is none, if it cannot be read, or if it has another format version.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{directory} has no {MANIFEST_NAME}; make one with: "
            f"distmoe data prepare INPUT --out {directory}"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        version = fields["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        # What is no JSON names its line, column and character.
        raise ValueError(f"{path} is not a manifest of distmoe ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format_version {version}; this code reads {FORMAT_VERSION}")
    try:
        return _manifest(fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of distmoe ({error!r})") from error


def check_files(directory: Path, splits: dict[str, Split], *, dtype: str) -> None:
    """ValueError if a shard's file is missing or its size is not what the manifest says."""
    for split in splits.values():
        for shard in split.shards:
            check_shard(directory, shard, dtype=dtype)


def check_shard(directory: Path, shard: Shard, *, dtype: str) -> None:
    """`check_files` of one shard."""
    wanted_data = shard.tokens * np.dtype(dtype).itemsize
    if shard.bytes != wanted_data:
        raise ValueError(
            f"{directory / MANIFEST_NAME} is damaged: {shard.name} has {shard.bytes} bytes there, "
            f"and {shard.tokens} tokens of {dtype}, which are {wanted_data}"
        )
    wanted_index = 8 * (shard.documents + 1)
    for suffix, wanted in ((".bin", wanted_data), (".idx", wanted_index)):
        _check_size(directory / f"{shard.name}{suffix}", wanted)


def _check_size(path: Path, wanted: int) -> None:
    size = path.stat().st_size if path.is_file() else None
    if size != wanted:
        found = "missing" if size is None else f"{size} bytes long"
        raise ValueError(
            f"{path} is {found}, its manifest says {wanted} bytes;"
            " make it again with: distmoe data prepare ... --force"
        )


def _manifest(fields: dict[str, Any]) -> Manifest:
    splits = {
        name: make_split(tuple(Shard(**shard) for shard in split["shards"]))
        for name, split in fields["splits"].items()
    }
    return Manifest(
        **{
            **fields,
            "splits": splits,
            "sources": tuple(Source(**source) for source in fields["sources"]),
            "totals": Totals(**fields["totals"]),
        }
    )
