"""A console that nobody reads, or that has no room, ends no run."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from distmoe.metrics.console import RunConsole

FULL_DEVICE = Path("/dev/full")


def console_on(stream: io.TextIOBase, monkeypatch: pytest.MonkeyPatch) -> RunConsole:
    monkeypatch.setattr(sys, "stdout", stream)
    return RunConsole(enabled=True, steps=10)


def test_a_reader_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    stream = os.fdopen(writer, "w")
    console = console_on(stream, monkeypatch)
    console.line("read")
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)
    for _ in range(3):
        console.line("unread")
    console.end()
    # As Python does at the end of a process, which would have exit code 120.
    stream.close()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert "Broken pipe; nothing more comes there; training goes on" in told[0]


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="no /dev/full")
def test_a_disk_that_stays_full(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stream = FULL_DEVICE.open("w")
    console = console_on(stream, monkeypatch)
    for _ in range(5000):
        console.line("a line that does not fit")
    console.end()
    stream.close()
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1
    assert "No space left on device; lines will be missing there" in told[0]


class Disk(io.RawIOBase):
    """A file on a disk that is ``full`` at times."""

    full = False

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written += bytes(data)
        return len(data)


def test_lines_come_when_there_is_room_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk()
    console = console_on(io.TextIOWrapper(io.BufferedWriter(disk)), monkeypatch)
    for number in range(5):
        disk.full = number in (1, 2)
        console.line(f"step {number}")
    assert disk.written.decode().split("\n") == [*(f"step {n}" for n in range(5)), ""]


def test_no_standard_output_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    console = RunConsole(enabled=True, steps=10)
    console.line("unread")
    console.end()
