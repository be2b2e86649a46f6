"""`python ...` without its imports: a fork of a process that has imported torch and the trainer.

To import them takes a rank three seconds of a core, which is most of what a small run costs. All
else is as in a process of its own: process ids, parents, sessions, signals, variables, exit codes.
What a program of this kind starts with the same Python, its ranks above all, is forked too.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import current_process, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any
from unittest.mock import patch

IMPORTED = ["distmoe.train.trainer", "distmoe.engines.fsdp2", "distmoe.planner.measure_machine"]
IMPORTED += ["torch._dynamo", "torch.utils.tensorboard"]
# Read when torch is imported. Ranks of tests have one thread, and want no words of C++.
VARIABLES = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

_server = get_context("forkserver")
_server.set_forkserver_preload(IMPORTED)
_fork = get_context("fork")


class WarmProcess:
    """What tests and launchers use of a subprocess.Popen. ``output``: where what it prints goes."""

    def __init__(
        self, arguments: Sequence[str], process: BaseProcess, output: IO[str] | None = None
    ) -> None:
        self.args = arguments
        self._process = process
        process.start()
        self.pid = int(process.pid or 0)
        self._output = output

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def said(self) -> str:
        """What it has printed so far."""
        assert self._output is not None
        self._output.seek(0)
        return self._output.read()

    def communicate(
        self, stdin: None = None, timeout: float | None = None
    ) -> tuple[str | None, None]:
        """All that it prints, if it is known where; after ``timeout`` seconds it is killed."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        return self.said() if self._output else None, None

    def __enter__(self) -> WarmProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()


def start_python(*arguments: str, **variables: str) -> WarmProcess:
    """`python ARGUMENTS`, with ``variables`` beside those of this process; stderr is in stdout."""
    # Gone with the process's object, in the end.
    output = NamedTemporaryFile("r")
    return _start(arguments, variables, output, output)


def run_python(
    *arguments: str, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The same until it ends, with stdout and stderr apart."""
    with NamedTemporaryFile("r") as output, NamedTemporaryFile("r") as errors:
        process = _start(arguments, variables, output, errors)
        stdout, _ = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(arguments, process.wait(), str(stdout), errors.read())


def _start(
    arguments: Sequence[str], variables: Mapping[str, str], output: Any, errors: Any
) -> WarmProcess:
    process = _server.Process(
        target=_program,
        args=(arguments, {**os.environ, **variables}, os.getcwd(), output.name, errors.name),
        daemon=True,
    )
    with patch.dict(os.environ, VARIABLES):
        return WarmProcess(arguments, process, output)


def _program(
    arguments: Sequence[str], environment: Mapping[str, str], folder: str, *outputs: str
) -> None:
    """In the fork: its place in the system, and then the program."""
    # It may have children.
    current_process().daemon = False
    for stream, path in enumerate(outputs, start=1):
        with Path(path).open("a") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(folder)
    subprocess.Popen = _ForkingPopen  # type: ignore[misc]
    _run(arguments, environment)


def _run(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """What `python ARGUMENTS` runs."""
    os.environ.clear()
    os.environ.update(environment)
    if arguments[0] == "-m":
        _, module, *sys.argv[1:] = arguments
        # The parent may have been the same program.
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent.resolve()))
        runpy.run_path(arguments[0], run_name="__main__")


class _ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """Forks where the program is this Python and its output goes where this one's goes."""

    def __new__(cls, command: Sequence[str], **options: Any) -> Any:
        is_plain = options.keys() <= _OPTIONS and options.get("stdout") != subprocess.PIPE
        if command[0] == sys.executable and is_plain:
            process = _fork.Process(target=_child, args=(command[1:],), kwargs=options)
            return WarmProcess(command, process)
        return super().__new__(cls)


_OPTIONS = {"env", "cwd", "stdin", "stdout", "stderr", "start_new_session", "preexec_fn"}
# As exec leaves them.
_HANDLED = (signal.SIGTERM, signal.SIGUSR1)


def _child(
    arguments: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: int | None = None,
    stdout: IO[Any] | None = None,
    stderr: IO[Any] | int | None = None,
    start_new_session: bool = False,
    preexec_fn: Callable[[], None] | None = None,
) -> None:
    """What exec would do, in the fork of a fork; its stdin is that of every such process: empty."""
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if start_new_session:
        os.setsid()
    if preexec_fn is not None:
        preexec_fn()
    for file, stream in ((stdout, 1), (stdout if stderr == subprocess.STDOUT else stderr, 2)):
        if file is not None:
            os.dup2(file.fileno(), stream)
    os.chdir(cwd or ".")
    _run(arguments, env or dict(os.environ))
