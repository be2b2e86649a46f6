"""The ranks of one machine as processes: start them, pass signals on, stop all when one fails.

torchrun does this too; here a failure is one line, and the parent pays for no import of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from math import inf

from distmoe.config import RankInfo
from distmoe.launch.env import worker_environment

POLL_S = 0.02
NOTICE_S = 2.0
"""Time for the other ranks to notice by themselves that one has failed."""
TERMINATE_S = 5.0
"""Time to end after SIGTERM."""
FORWARDED = (signal.SIGINT, signal.SIGTERM)
PR_SET_PDEATHSIG = 1

WRONG_CONFIG = 2


def run_local(command: Sequence[str], nproc: int, *, threads: int = 0, advice: str = "") -> int:
    """Run ``command`` as ``nproc`` ranks and wait; 0, 2 if a rank ended with 2, else 1.

    ``threads``: CPU threads of a rank; 0: the cores divided by the ranks. ``advice`` is what a user
    can do after a failure; it ends the one line that names the rank.
    """
    with _received_signals() as received:
        ranks = _Ranks(received)
        try:
            ranks.start(command, nproc, threads=threads or max(1, _cores() // nproc))
            ranks.wait()
            return ranks.report(advice)
        finally:
            ranks.send(signal.SIGKILL)


class _Ranks:
    """The running processes. Signals that arrive are noted, and delivered between two polls."""

    def __init__(self, received: list[int]) -> None:
        self._received = received
        self._delivered = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._first_failed: int | None = None

    def start(self, command: Sequence[str], nproc: int, *, threads: int) -> None:
        port = _free_port()
        for rank in range(nproc):
            place = RankInfo(rank, nproc, rank, nproc, "127.0.0.1", port, "local")
            process = subprocess.Popen(
                command,
                env=worker_environment(place, threads=threads),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C goes to its whole session: here only to the parent.
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
            self._processes.append(process)

    def wait(self) -> None:
        """Until all have ended: by themselves, or stopped because one has failed."""
        if not self._wait_until(lambda: not self._running() or self._failed(), inf):
            return
        for seconds, signum in ((NOTICE_S, signal.SIGTERM), (TERMINATE_S, signal.SIGKILL)):
            if not self._wait_until(lambda: not self._running(), seconds):
                self.send(signum)
        self._wait_until(lambda: not self._running(), inf)

    def send(self, signum: int) -> None:
        """Send a signal once to every rank that still runs; SIGKILL to its children too."""
        for process in self._running():
            with contextlib.suppress(ProcessLookupError):
                kill = os.killpg if signum == signal.SIGKILL else os.kill
                kill(process.pid, signum)

    def report(self, advice: str) -> int:
        """Print the one line about a failure, if there is one; the exit code."""
