"""What a complete checkpoint consists of: ``manifest.json``, the last file that is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distmoe.checkpoint.disk import FileMark, mark_of

NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """``files``: every other file by name. ``about``: the run that wrote the checkpoint, such as
    ``world``, ``engine`` and its ``config`` as TOML."""

    step: int
    files: Mapping[str, FileMark]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(mark.bytes for mark in self.files.values())

    def to_json(self) -> str:
        """The text of the file, with a hash of itself."""
        contents = {
            "format": FORMAT,
            "step": self.step,
            "about": dict(self.about),
            "files": {name: asdict(mark) for name, mark in sorted(self.files.items())},
        }
        return json.dumps({**contents, "sha256": _digest(contents)}, indent=1) + "\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``. OSError if there is none, ValueError if it is
    damaged or of another format."""
    try:
        contents = json.loads((path / NAME).read_text())
        digest = contents.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{NAME} is damaged") from error
    if digest != _digest(contents):
        raise ValueError(f"{NAME} is damaged: its own hash differs")
    if contents["format"] != FORMAT:
        raise ValueError(f"{NAME} is of format {contents['format']}; this version reads {FORMAT}")
    files = {name: FileMark(**mark) for name, mark in contents["files"].items()}
    return Manifest(contents["step"], files, contents["about"])


def has_weights_only(path: Path) -> bool:
    """Whether the sound checkpoint ``path`` is of a model that was imported, not of a run."""
    return "hf_config" in read_manifest(path).about


def damage(path: Path, *, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the checkpoint ``path``: nothing, or a line for every file.

    With ``parts`` readers, reader ``part`` hashes only its share of the files.
    """
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        return [f"{NAME} is missing" if is_missing else str(error)]
    found = (
        _wrong(path / name, manifest.files[name]) for name in sorted(manifest.files)[part::parts]
    )
    return [line for line in found if line]


def _wrong(file: Path, expected: FileMark) -> str:
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            return f"{file.name} has {size:,} bytes instead of {expected.bytes:,}"
        if mark_of(file) != expected:
            return f"{file.name} has another SHA-256 than when it was written"
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        return f"{file.name} is missing" if is_missing else f"{file.name}: {error.strerror}"
    return ""


def _digest(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
