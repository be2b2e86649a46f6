"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest
from short_runs import train_here

from distmoe.config import ConfigError
from distmoe.train.run_lock import NAME, OTHER_HOST_WAIT_S, RunLock


def no_sleep(seconds: float) -> None:
    raise AssertionError("a process of this host is not waited for")


def test_a_second_run_is_refused_before_it_touches_anything(data: Path, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run.dir is '.*/run'; it must .* and process \d+ on "):
        train_here(tmp_path, data)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    with pytest.raises(ConfigError):
        RunLock(tmp_path / "run", sleep=no_sleep)
    lock.release()
    RunLock(tmp_path / "run", sleep=no_sleep).release()


def test_a_run_of_another_host_is_waited_for(tmp_path: Path) -> None:
    """Its node may have died, and the file server not know it yet."""
    lock = RunLock(tmp_path)
    (tmp_path / NAME).write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    slept: list[float] = []
    with pytest.raises(ConfigError, match="process 7 on elsewhere does"):
        RunLock(tmp_path, sleep=slept.append)
    assert sum(slept) == OTHER_HOST_WAIT_S

    def until_it_is_gone(seconds: float) -> None:
        lock.release()

    RunLock(tmp_path, sleep=until_it_is_gone).release()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "has no locks; nothing keeps a second run out" in RunLock(tmp_path).note
