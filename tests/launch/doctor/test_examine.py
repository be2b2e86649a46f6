"""Checks that hang, break or have no answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import pytest

from distmoe.config import ConfigError
from distmoe.launch.doctor.examine import examine
from distmoe.launch.doctor.finding import Finding, Status, passed
from distmoe.launch.doctor.probes import ProbeError, ProbeProcess
from distmoe.launch.doctor.situation import Check, Situation

Make = Callable[..., Situation]


def raising(error: Exception) -> Check:
    def check(situation: Situation) -> Finding:
        raise error

    return check


def test_no_check_stops_the_others(situation: Make) -> None:
    released = threading.Event()

    def hangs(situation: Situation) -> Finding:
        released.wait()
        return passed("too late")

    themes = {
        "one": {"hangs": hangs, "good": lambda situation: passed(f"{situation.world} rank")},
        "other": {
            "broken": raising(PermissionError(13, "Permission denied", "/data")),
            "unanswered": raising(ProbeError("no answer in 11 s")),
            "program": raising(subprocess.TimeoutExpired(["srun", "--mpi=list"], 6)),
            "setting": raising(ConfigError(["data.mix has 'web'; it must be", "b"])),
        },
    }
    began = time.monotonic()
    results = list(examine(situation(), themes, seconds=0.3))
    assert time.monotonic() - began < 2
    released.set()
    assert [(r.theme, r.check, r.finding.status) for r in results] == [
        ("one", "hangs", Status.FAIL),
        ("one", "good", Status.PASS),
        ("other", "broken", Status.FAIL),
        ("other", "unanswered", Status.SKIP),
        ("other", "program", Status.WARN),
        ("other", "setting", Status.SKIP),
    ]
    seen = [result.finding.seen for result in results]
    assert seen[0] == "no answer in 0.3 s"
    assert "PermissionError: [Errno 13] Permission denied: '/data'" in seen[2]
    assert seen[4] == "srun has not answered in 6 s"
    assert seen[5] == "data.mix has 'web'; it must be; see `settings`"


SCRIPT = """
import json, os, sys, time
print("a library says hello", flush=True)
print(json.dumps({"probe": "good", "answer": {"n": 1}}), flush=True)
print(json.dumps({"probe": "bad", "answer": {"error": "OSError: no"}}), flush=True)
"""


def probe(end: str, seconds: float) -> ProbeProcess:
    return ProbeProcess([sys.executable, "-I", "-S", "-c", SCRIPT + end], {}, seconds=seconds)


@pytest.mark.parametrize(
    ("end", "seconds", "words"),
    [
        ("time.sleep(60)", 1.0, "no answer in 1 s"),
        ("os.abort()", 20.0, "the probe ended with exit code -6"),
        ("", 20.0, "the probe ended with exit code 0"),
    ],
)
def test_probes_answer_until_their_process_ends(end: str, seconds: float, words: str) -> None:
    process = probe(end, seconds)
    assert process.answer("good") == {"n": 1}
    with pytest.raises(ProbeError, match="OSError: no"):
        process.answer("bad")
    with pytest.raises(ProbeError, match=words):
        process.answer("missing")
    process.wait()


def test_a_probe_is_killed_with_what_it_has_started() -> None:
    child = "import subprocess; p = subprocess.Popen(['sleep', '60'])\n"
    child += "print(json.dumps({'probe': 'pid', 'answer': {'pid': p.pid}}), flush=True); p.wait()"
    process = probe(child, 20.0)
    pid = process.answer("pid")["pid"]
    process.kill()
    deadline = time.monotonic() + 5
    while _is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.wait()
    process.kill()


def test_nobody_waits_for_a_probe_that_the_kill_does_not_end() -> None:
    # As one that is stuck in a driver, its pipe stays open: the kill does not reach its child.
    child = "import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    child += "print(json.dumps({'probe': 'pid', 'answer': {'pid': p.pid}}), flush=True); p.wait()"
    process = probe(child, 0.4)
    pid = process.answer("pid")["pid"]
    in_the_end = threading.Timer(3, os.kill, (pid, signal.SIGKILL))
    in_the_end.start()
    process.wait()
    with pytest.raises(ProbeError, match=r"no answer in 0\.4 s"):
        process.answer("missing")
    assert in_the_end.is_alive()
    in_the_end.cancel()
    os.kill(pid, signal.SIGKILL)


def _is_running(pid: int) -> bool:
    """A zombie that init has not yet taken is not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
