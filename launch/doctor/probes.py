"""The other side of `probe_process`: starts it, waits for its answers, and ends it in time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from distmoe.launch.local import die_with

COMMAND = (sys.executable, "-m", "distmoe.launch.doctor.probe_process")

# After the kill, for the process to end; one that is stuck in a driver does not.
KILL_SECONDS = 0.5


class ProbeError(RuntimeError):
    """Why a probe has no answer."""


class ProbeProcess:
    """Runs ``command`` beside this process, which it survives by no means; after ``seconds`` it is
    killed. Made in the main thread."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], *, seconds: float
    ) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds + KILL_SECONDS
        self._late = f"no answer in {seconds:g} s"
        self._answers: dict[str, dict[str, Any]] = {}
        self._news = threading.Condition()
        self._end = ""
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # With all that it starts, so that it can be killed as a whole.
            start_new_session=True,
            preexec_fn=partial(die_with, os.getpid()),
        )
        threading.Thread(target=self._read, daemon=True).start()

    def answer(self, name: str) -> dict[str, Any]:
        """The answer of a probe, as soon as it is there. ProbeError for an error of the probe, and
        if the process ends or its time is over without an answer."""
        self._wait_for(lambda: name in self._answers or bool(self._end))
        if name not in self._answers:
            raise ProbeError(self._end or self._late)
        answer = self._answers[name]
        if "error" in answer:
            raise ProbeError(answer["error"])
        return answer

    def wait(self) -> None:
        """Until the process has ended, or has been killed and does not end."""
        self._wait_for(lambda: bool(self._end))

    def _wait_for(self, come: Callable[[], bool]) -> None:
        with self._news:
            self._news.wait_for(come, timeout=max(0.0, self._deadline - time.monotonic()))

    def kill(self) -> None:
        """End the process and what it has started; harmless if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        timer = threading.Timer(self._seconds, self.kill)
        timer.start()
        stdout = self._process.stdout
        for line in stdout or ():
            # Libraries print, too.
            with contextlib.suppress(ValueError, TypeError, KeyError):
                message = json.loads(line)
                with self._news:
                    self._answers[message["probe"]] = message["answer"]
                    self._news.notify_all()
        code = self._process.wait()
        in_time = timer.is_alive()
        timer.cancel()
        with self._news:
            self._end = f"the probe ended with exit code {code}" if in_time else self._late
            self._news.notify_all()
