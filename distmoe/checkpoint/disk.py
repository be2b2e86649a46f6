"""Every change that a save makes to the file system, so that a test can break each of them.

What is written is hashed on the way, and synced before it is closed: a file that has a `FileMark`
survives a power cut as soon as its folder is synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.filesystem import FileSystem

READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileMark:
    """Size and SHA-256 (as hexadecimal digits) of a file."""

    bytes: int
    sha256: str


class Disk(FileSystem):
    """The file system under torch.distributed.checkpoint. ``marks``: the files written since they
    were last cleared, by name. ``error``: the first one of a write, which torch.save may hide
    behind an error of its own."""

    def __init__(self) -> None:
        self.marks: dict[str, FileMark] = {}
        self.error: OSError | None = None

    def begin(self) -> None:
        """Forget the files of the save before."""
        self.marks, self.error = {}, None

    @contextlib.contextmanager
    def create_stream(
        self, path: str | os.PathLike[str], mode: str
    ) -> Generator[io.IOBase, None, None]:
        """A stream over ``path``; one that is written is synced and gets its mark at the end."""
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with self.open(Path(path)) as file:
            hashed = _HashedFile(self, file)
            yield hashed
            self.sync(file)
        self.marks[Path(path).name] = FileMark(hashed.size, hashed.digest.hexdigest())

    def open(self, path: Path) -> BinaryIO:
        """``path``, empty, for writing."""
        return path.open("wb")

    def write(self, file: BinaryIO, data: Any) -> None:
        file.write(data)

    def sync(self, file: BinaryIO) -> None:
        """Until the file's contents are on the disk."""
        file.flush()
        os.fsync(file.fileno())

    def sync_folder(self, path: Path) -> None:
        """Until the names in a folder are on the disk."""
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        Path(path).rename(new_path)
        mark = self.marks.pop(Path(path).name, None)
        if mark is not None:
            self.marks[Path(new_path).name] = mark

    def remove_folder(self, path: Path) -> None:
        """Delete a folder of files; what cannot be deleted is left."""
        with contextlib.suppress(OSError):
            for file in path.iterdir():
                self.rm_file(file)
            self.rmdir(path)

    def rmdir(self, path: Path) -> None:
        path.rmdir()


class _HashedFile(io.RawIOBase):
    """Writes go to ``file``, by ``disk``, and into ``digest``."""

    def __init__(self, disk: Disk, file: BinaryIO) -> None:
        self._disk, self._file = disk, file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            self._disk.write(self._file, data)
        except OSError as error:
            self._disk.error = self._disk.error or error
            raise
        self.digest.update(data)
        count = memoryview(data).nbytes
        self.size += count
        return count

    def tell(self) -> int:
        return self.size


def mark_of(path: Path) -> FileMark:
    """The mark of a file as it is now."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
            size += len(data)
    return FileMark(size, digest.hexdigest())
