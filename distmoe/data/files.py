"""Files that are complete or absent, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

UNFINISHED = ".part"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 beside ``path``, then rename: a reader never sees half a file."""
    part = path.with_name(path.name + UNFINISHED)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def sha256_of_text(text: str) -> str:
    """Hex digest of the UTF-8 bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
