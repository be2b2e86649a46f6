"""A fork in the place of `python ...` is a process like any other."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from warm_python import run_python, start_python

pytestmark = pytest.mark.processes

PROGRAM = """
import os, signal, subprocess, sys
name = sys.argv[1]
print(name, os.environ.get("WORD"), __name__, os.getsid(0) == os.getpid(), flush=True)
if name == "parent":
    environment = {**os.environ, "WORD": "b"}
    command = [sys.executable, __file__, "child"]
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    sys.exit(child.wait())
if name == "broken":
    raise ValueError("as it had to be")
if name == "asleep":
    signal.pause()
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def test_arguments_variables_children_and_exit_codes(program: str) -> None:
    done = run_python(program, "parent", WORD="a")
    assert done.stdout.splitlines() == ["parent a __main__ False", "child b __main__ True"]
    assert (done.returncode, done.stderr) == (7, "")


def test_an_error_is_a_traceback_and_1(program: str) -> None:
    done = run_python(program, "broken")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: as it had to be\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(program: str, signum: int) -> None:
    process = start_python(program, "asleep")
    process.send_signal(signum)
    assert process.wait(timeout=60) == -signum


def test_a_module() -> None:
    done = run_python("-m", "distmoe", "--version")
    assert (done.returncode, done.stdout[:8]) == (0, "distmoe ")
