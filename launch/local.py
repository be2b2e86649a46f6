"""The ranks of one machine as processes: start them, pass signals on, stop all when one fails.

torchrun does this too; here a failure is one line, and the parent pays for no import of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf

from distmoe.config import RankInfo
from distmoe.launch.env import worker_environment
from distmoe.launch.ports import free_port

POLL_S = 0.02
NOTICE_S = 2.0
"""Time for the other ranks to notice by themselves that one has failed."""
TERMINATE_S = 5.0
"""Time to end after SIGTERM."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
# Found before any fork: between fork and exec a child must not load a library.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

WRONG_CONFIG = 2
STOPPED = 75
"""A signal ended the run early and its state is saved: a job script may start it again."""


def run_local(command: Sequence[str], nproc: int, *, threads: int = 0, advice: str = "") -> int:
    """Run ``command`` as ``nproc`` ranks and wait; 0, 2 if a rank ended with 2, 75 if a signal
    stopped them in good order, else 1.

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
        self._failed: tuple[int, int] | None = None

    def start(self, command: Sequence[str], nproc: int, *, threads: int) -> None:
        port = free_port()
        for rank in range(nproc):
            place = RankInfo(rank, nproc, rank, nproc, "127.0.0.1", port, "local")
            process = subprocess.Popen(
                command,
                env=worker_environment(place, threads=threads),
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C goes to its whole session: here only to the parent.
                start_new_session=True,
                preexec_fn=partial(die_with, os.getpid()),
            )
            self._processes.append(process)

    def wait(self) -> None:
        """Until all have ended, by themselves or stopped because one has failed."""
        self._wait_until(lambda: self._note_failure() or not self._running(), inf)
        for seconds, signum in ((NOTICE_S, signal.SIGTERM), (TERMINATE_S, signal.SIGKILL)):
            if not self._wait_until(lambda: not self._running(), seconds):
                self.send(signum)
        self._wait_until(lambda: not self._running(), inf)

    def send(self, signum: int) -> None:
        """Send a signal to every rank that still runs; SIGKILL goes to its children too."""
        for process in self._running():
            if signum == signal.SIGKILL:
                os.killpg(process.pid, signum)
            else:
                process.send_signal(signum)

    def report(self, advice: str) -> int:
        """The exit code, after one line on stderr that says which rank failed, and how."""
        codes = [process.returncode for process in self._processes]
        if self._failed is None:
            return STOPPED if STOPPED in codes else 0
        rank, code = self._failed
        # Rank 0 has said what is wrong with the settings.
        if codes[0] != WRONG_CONFIG:
            print(f"{self._cause(rank, code)}{advice and '; ' + advice}", file=sys.stderr)
        return WRONG_CONFIG if WRONG_CONFIG in codes else 1

    def _cause(self, rank: int, code: int) -> str:
        if self._received.count(signal.SIGINT) > 1:
            return "all ranks were killed by a second Ctrl-C"
        if -code in self._received:
            return f"all ranks were stopped by {signal.Signals(-code).name}"
        end = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
        if -code == signal.SIGKILL:
            end += " (the kernel does that when memory runs out)"
        return f"rank {rank} {end}; the others were stopped"

    def _running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def _note_failure(self) -> bool:
        """Keep the first rank that has failed, and how."""
        codes = [(rank, process.poll()) for rank, process in enumerate(self._processes)]
        failed = [(rank, code) for rank, code in codes if code and code != STOPPED]
        if failed and self._failed is None:
            # A rank that a signal ended is the cause; its peers then end with an error.
            self._failed = min(failed, key=lambda end: (end[1] > 0, end[0]))
        return bool(failed)

    def _wait_until(self, done: Callable[[], bool], seconds: float) -> bool:
        """Whether ``done`` came true in time. Signals are passed on meanwhile."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                return False
            self._pass_on_signals()
            time.sleep(POLL_S)
        return True

    def _pass_on_signals(self) -> None:
        for position in range(self._delivered, len(self._received)):
            signum = self._received[position]
            earlier = signum in self._received[:position]
            if not earlier:
                self.send(signum)
            elif signum == signal.SIGINT:
                self.send(signal.SIGKILL)
            self._delivered += 1


@contextlib.contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The forwarded signals that arrive, in their order, instead of their effect here."""
    received: list[int] = []
    before = {
        signum: signal.signal(signum, lambda number, frame: received.append(number))
        for signum in FORWARDED
        # The ranks inherit what nohup ignores.
        if (signum, signal.getsignal(signum)) != (signal.SIGHUP, signal.SIG_IGN)
    }
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def die_with(parent: int) -> None:
    """In a child: the kernel kills it when ``parent`` is gone."""
    if _PRCTL is None:
        return
    _PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before the call.
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
