"""Tiny ranks instead of a training run, under a launcher that is a process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

LAUNCHER = """
import sys
from distmoe.launch.local import run_local
sys.exit(run_local([sys.executable, "-c", sys.argv[1]], 2, threads=3, advice="ADVICE"))
"""
PREAMBLE = """
import os, pathlib, signal, sys, time
rank = int(os.environ["RANK"])
folder = pathlib.Path(os.environ["NOTES"])
def note(text):
    with open(folder / f"{rank}.txt", "a") as file:
        file.write(text + " ")
signal.signal(signal.SIGINT, signal.SIG_DFL)
"""

Start = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts two ranks that run the given code after PREAMBLE."""
    started: list[subprocess.Popen[str]] = []

    def begin(code: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, PREAMBLE + textwrap.dedent(code)],
            env={**os.environ, "NOTES": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]") -> tuple[int, list[str]]:
    _, errors = process.communicate(timeout=30)
    return process.returncode, errors.splitlines()


def notes(folder: Path, rank: int) -> list[str]:
    path = folder / f"{rank}.txt"
    return path.read_text().split() if path.exists() else []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in 20 seconds"
        time.sleep(0.02)


def wait_for_notes(folder: Path, count: int) -> None:
    wait_for(lambda: all(len(notes(folder, rank)) >= count for rank in range(2)))


def test_success_and_the_environment_of_a_rank(start: Start, tmp_path: Path) -> None:
    process = start(
        """
        from distmoe.launch.env import rank_info
        place = rank_info()
        note(f"{place.rank}/{place.world}/{place.local_rank}/{place.local_world}/{place.source}")
        note(f"{place.master_addr}:{place.master_port}")
        note(os.environ["OMP_NUM_THREADS"])
        """
    )
    assert finish(process) == (0, [])
    first, second = notes(tmp_path, 0), notes(tmp_path, 1)
    assert (first[0], second[0]) == ("0/2/0/2/local", "1/2/1/2/local")
    assert first[1:] == second[1:]
    assert first[2] == "3"


def test_failing_rank_stops_the_others_and_is_named(start: Start, tmp_path: Path) -> None:
    process = start(
        """
        if rank == 1:
            sys.exit(5)
        signal.signal(signal.SIGTERM, lambda *_: (note("TERM"), sys.exit(0)))
        time.sleep(60)
        """
    )
    began = time.monotonic()
    expected = "rank 1 ended with exit code 5; the others were stopped; ADVICE"
    assert finish(process) == (1, [expected])
    assert notes(tmp_path, 0) == ["TERM"]
    assert time.monotonic() - began < 6


def test_killed_rank_is_named_though_its_peer_fails_too(start: Start) -> None:
    process = start(
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.3)
        sys.exit(1)
        """
    )
    code, (line,) = finish(process)
    assert code == 1
    assert line.startswith("rank 1 was killed by signal 9 (the kernel does that when memory runs")
    assert line.endswith("the others were stopped; ADVICE")


def test_rank_that_ignores_sigterm_is_killed(start: Start) -> None:
    process = start(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if rank == 0:
            time.sleep(1)
            sys.exit(1)
        time.sleep(60)
        """
    )
    code, (line,) = finish(process)
    assert (code, line) == (1, "rank 0 ended with exit code 1; the others were stopped; ADVICE")


def test_wrong_config_gives_2_without_another_line(start: Start) -> None:
    assert finish(start("sys.exit(2)")) == (2, [])


def test_ranks_that_have_saved_give_75_without_a_line(start: Start) -> None:
    assert finish(start("time.sleep(rank); sys.exit(75)")) == (75, [])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_signal_reaches_every_rank_once(start: Start, tmp_path: Path, signum: int) -> None:
    process = start(
        f"""
        seen = []
        signal.signal({int(signum)}, lambda *_: (seen.append(1), note("signal")))
        note("ready")
        while not seen:
            time.sleep(0.01)
        time.sleep(0.5)
        """
    )
    wait_for_notes(tmp_path, 1)
    process.send_signal(signum)
    assert finish(process) == (0, [])
    assert notes(tmp_path, 0) == notes(tmp_path, 1) == ["ready", "signal"]


def test_signal_that_ends_the_ranks_is_named(start: Start, tmp_path: Path) -> None:
    process = start("note('ready'); time.sleep(60)")
    wait_for_notes(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (1, ["all ranks were stopped by SIGINT; ADVICE"])


def test_second_ctrl_c_kills_at_once(start: Start, tmp_path: Path) -> None:
    process = start(
        """
        signal.signal(signal.SIGINT, lambda *_: note("signal"))
        note("ready")
        while True:
            time.sleep(1)
        """
    )
    wait_for_notes(tmp_path, 1)
    process.send_signal(signal.SIGINT)
    wait_for_notes(tmp_path, 2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert finish(process) == (1, ["all ranks were killed by a second Ctrl-C; ADVICE"])
    assert time.monotonic() - began < 2


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_ranks_die_with_a_launcher_that_is_killed(start: Start, tmp_path: Path) -> None:
    process = start("note(str(os.getpid())); time.sleep(60)")
    wait_for_notes(tmp_path, 1)
    process.kill()
    for rank in range(2):
        pid = int(notes(tmp_path, rank)[0])
        wait_for(lambda pid=pid: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    # Nobody may be there to reap it.
    return state != "Z"
