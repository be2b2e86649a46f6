"""Disks that fail at a chosen call, as a killed process or a full file system would."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any, BinaryIO

from distmoe.checkpoint.disk import Disk


class Killed(BaseException):
    """The process would be gone."""


class CountingDisk(Disk):
    """Notes every call that changes the disk as (what, name), and lets `_strike` break it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def strike(self, number: int) -> None:
        """Called before call ``number``, from 0 on."""

    def _call(self, what: str, name: str) -> None:
        self.calls.append((what, name))
        self.strike(len(self.calls) - 1)

    def open(self, path: Path) -> BinaryIO:
        self._call("open", path.name)
        return super().open(path)

    def write(self, file: BinaryIO, data: Any) -> None:
        self._call("write", Path(file.name).name)
        super().write(file, data)

    def sync(self, file: BinaryIO) -> None:
        self._call("sync", Path(file.name).name)
        super().sync(file)

    def sync_folder(self, path: Path) -> None:
        self._call("sync folder", path.name)
        super().sync_folder(path)

    def rename(self, path: Any, new_path: Any) -> None:
        self._call("rename", Path(new_path).name)
        super().rename(path, new_path)

    def mkdir(self, path: Any) -> None:
        self._call("mkdir", Path(path).name)
        super().mkdir(path)

    def rm_file(self, path: Any) -> None:
        self._call("remove", Path(path).name)
        super().rm_file(path)

    def rmdir(self, path: Path) -> None:
        self._call("rmdir", path.name)
        super().rmdir(path)


class KillingDisk(CountingDisk):
    """Dies at call ``at``, and does nothing more."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def strike(self, number: int) -> None:
        if number >= self.at:
            raise Killed


class FullDisk(CountingDisk):
    """Has no space from call ``at`` on; renames and deletes, which need none, still work."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def strike(self, number: int) -> None:
        what, name = self.calls[number]
        if number >= self.at and what in ("open", "write", "sync", "sync folder", "mkdir"):
            raise OSError(errno.ENOSPC, "No space left on device", name)
