"""Standard output whose end costs no training: a closed pipe, a lost terminal, a full disk."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from typing import Any

# What there may be room for again; every other error is for good.
FULL = (errno.ENOSPC, errno.EDQUOT)


class StandardOutput:
    """A file for rich that is whatever `sys.stdout` is now, and raises no OSError.

    What a full disk refuses stays in the buffer of `sys.stdout` and comes with a later line; what
    does not fit there is lost. Any other error ends the output. The first error is told on stderr.
    """

    def __init__(self) -> None:
        self._error: OSError | None = None
        self._told = self._gone = False

    def write(self, text: str) -> None:
        self._try("write", text)

    def flush(self) -> None:
        self._try("flush")

    def isatty(self) -> bool:
        stream = _stream()
        return stream is not None and bool(stream.isatty())

    def fileno(self) -> int:
        return int(_stream().fileno())

    @property
    def encoding(self) -> str:
        return getattr(_stream(), "encoding", None) or "utf-8"

    def end(self) -> None:
        """Give up what waits: Python would end with another exit code if it could not write it."""
        self.flush()
        if self._error is not None:
            self._leave()

    def _try(self, method: str, *arguments: str) -> None:
        stream = _stream()
        if stream is None or self._gone:
            return
        try:
            getattr(stream, method)(*arguments)
            self._error = None
        except OSError as error:
            self._error = error
            self._tell(error)
            if error.errno not in FULL:
                self._leave()

    def _tell(self, error: OSError) -> None:
        if self._told:
            return
        self._told = True
        rest = "lines will be missing there" if error.errno in FULL else "nothing more comes there"
        # Without Python's buffer, which could keep the line and fail at the exit.
        with suppress(OSError):
            line = f"warning: standard output: {error}; {rest}; training goes on\n"
            os.write(2, line.encode())

    def _leave(self) -> None:
        """From here on everything that anybody prints there goes to /dev/null."""
        self._gone = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):
            os.dup2(nowhere, self.fileno())
        os.close(nowhere)


def _stream() -> Any:
    """`sys.stdout`, or what a progress bar of rich has put itself in front of; None if there is
    none."""
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)
