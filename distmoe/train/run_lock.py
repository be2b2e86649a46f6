"""One run at a time in a folder: two would delete each other's checkpoints and metrics.

The kernel gives the lock back when the process ends, however it ends, so that no file has to be
removed by hand after a kill.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from distmoe.config import ConfigError

NAME = "LOCK"
# A predecessor may need a while to end; a file server needs one to see that a node has died, whose
# job is queued again elsewhere, perhaps under the same name.
SAME_BOOT_WAIT_S, OTHER_WAIT_S = 10.0, 120.0
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """Held by rank 0 from the beginning of a run to its end, by the open ``file``. ``note``: what
    the user has to know, or ""."""

    def __init__(self, file: TextIO) -> None:
        self._file, self.note = file, ""

    @classmethod
    def acquire(cls, folder: Path, *, sleep: Callable[[float], None] = time.sleep) -> RunLock:
        """The lock of ``folder``, which is made. ConfigError if another process has it, and keeps
        it for a while, in which the user is told."""
        folder.mkdir(parents=True, exist_ok=True)
        lock = cls((folder / NAME).open("a+"))
        waited = 0.0
        while not lock._take():
            holder = lock._holder()
            name = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
            wait_s = SAME_BOOT_WAIT_S if holder.get("boot") == _boot() else OTHER_WAIT_S
            if waited >= wait_s:
                lock.release()
                raise ConfigError(
                    f"run.dir is '{folder}'; it must be one in which no other run trains, and "
                    f"{name} does"
                )
            if not waited:
                print(
                    f"{name} trains in {folder}; waiting {wait_s:.0f} s for its end",
                    file=sys.stderr,
                )
            sleep(1.0)
            waited += 1.0
        if not lock.note:
            lock._sign()
        return lock

    def _sign(self) -> None:
        """For those who come later."""
        self._file.truncate(0)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot()}
        self._file.write(json.dumps(own))
        self._file.flush()

    def _take(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            self.note = f"warning: the file system of {self._file.name} has no locks; nothing keeps"
            self.note += " a second run out of this folder"
        return True

    def _holder(self) -> dict[str, object]:
        self._file.seek(0)
        try:
            found: dict[str, object] = json.loads(self._file.read())
        except ValueError:
            return {}
        return found

    def release(self) -> None:
        """Let another run in."""
        self._file.close()


def _boot() -> str:
    """Of this machine since it was started; machines that take each other's place share a name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
