"""prepare.json: what was asked for and how far the work has come, so that it can go on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distmoe.data.files import sha256_of_file, write_text
from distmoe.data.manifest import Shard, Source
from distmoe.data.sources import SourceFile

JOURNAL_NAME = "prepare.json"


@dataclass
class SplitProgress:
    """Finished shards of a split and the document that its next shard begins with."""

    shards: list[Shard] = field(default_factory=list)
    next_document: int = 0
    source: int = 0
    """Number of a file at or before next_document."""
    first_document: int = 0
    """Number of that file's first document."""


@dataclass
class Journal:
    """One preparation. ``request`` and ``sources`` decide whether a second call is the same."""

    request: dict[str, Any]
    sources: list[Source]
    seen: list[tuple[str, int]]
    """Path and modification time (ns) of each source: an unchanged file is not hashed again."""
    tokenizer_sha256: str = ""
    splits: dict[str, SplitProgress] = field(default_factory=dict)

    @property
    def has_shards(self) -> bool:
        """Whether there is work that starting over would lose."""
        return any(split.shards for split in self.splits.values())

    def is_same(self, other: Journal) -> bool:
        """Whether both are the same preparation, however far each has come."""
        return not _differences(self, other)

    def save(self, directory: Path) -> None:
        """Write <directory>/prepare.json at once."""
        write_text(directory / JOURNAL_NAME, json.dumps(asdict(self), indent=2) + "\n")


def load_journal(directory: Path) -> Journal | None:
    """The journal of a folder, if it has one; ValueError if it cannot be read."""
    path = directory / JOURNAL_NAME
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        splits = {name: _split_progress(split) for name, split in fields.pop("splits").items()}
        sources = [Source(**source) for source in fields.pop("sources")]
        return Journal(**fields, sources=sources, splits=splits)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); redo with --force") from error


def describe_sources(
    files: list[SourceFile], known: Journal | None
) -> tuple[list[Source], list[tuple[str, int]]]:
    """Name, size and hash of each file, and its path and modification time."""
    hashes = {}
    if known is not None:
        for source, (path, modified) in zip(known.sources, known.seen, strict=True):
            hashes[path, modified, source.bytes] = source.sha256
    sources, seen = [], []
    for file in files:
        status, path = file.path.stat(), str(file.path.resolve())
        known_hash = hashes.get((path, status.st_mtime_ns, status.st_size))
        sources.append(Source(file.name, status.st_size, known_hash or sha256_of_file(file.path)))
        seen.append((path, status.st_mtime_ns))
    return sources, seen


def require_same(directory: Path, old: Journal, new: Journal) -> None:
    """ValueError that names what differs, if ``new`` is not the preparation that ``old`` began."""
    if differences := _differences(old, new):
        raise ValueError(
            f"--out is '{directory}'; it holds another preparation ({'; '.join(differences)}); "
            "choose another folder, or redo it with --force"
        )


def _differences(old: Journal, new: Journal) -> list[str]:
    found = [
        f"{key} is {value!r}, was {old.request.get(key)!r}"
        for key, value in new.request.items()
        if value != old.request.get(key)
    ]
    if new.sources != old.sources:
        found.append(_source_difference(old.sources, new.sources))
    return found


def _source_difference(old: list[Source], new: list[Source]) -> str:
    for before, after in zip(old, new, strict=False):
        if before.name != after.name:
            return f"input {after.name!r} stands where {before.name!r} was"
        if before != after:
            return f"input {after.name!r} has changed"
    return f"{len(new)} input files, were {len(old)}"


def _split_progress(fields: dict[str, Any]) -> SplitProgress:
    return SplitProgress(**{**fields, "shards": [Shard(**s) for s in fields["shards"]]})
