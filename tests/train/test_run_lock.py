"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
from pathlib import Path

import pytest
from short_runs import train_here

from distmoe.config import ConfigError
from distmoe.train import run_lock
from distmoe.train.run_lock import NAME, RunLock


def test_a_second_run_is_refused_before_it_touches_anything(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = RunLock.acquire(tmp_path / "run")
    monkeypatch.setattr(run_lock, "SAME_BOOT_WAIT_S", 1.0)
    with pytest.raises(ConfigError, match=r"run.dir is '.*/run'; it must .* and process \d+ on "):
        train_here(tmp_path, data)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    assert f"trains in {tmp_path}/run; waiting 1 s for its end" in capsys.readouterr().err
    lock.release()
    RunLock.acquire(tmp_path / "run").release()


def test_a_run_of_another_machine_is_waited_for_longer(tmp_path: Path) -> None:
    """Its node may have died, and the file server not know it yet; it may have had this name."""
    lock = RunLock.acquire(tmp_path)
    (tmp_path / NAME).write_text(json.dumps({"host": "elsewhere", "pid": 7, "boot": "another"}))
    slept: list[float] = []
    with pytest.raises(ConfigError, match="process 7 on elsewhere does"):
        RunLock.acquire(tmp_path, sleep=slept.append)
    assert sum(slept) == run_lock.OTHER_WAIT_S

    def until_it_is_gone(seconds: float) -> None:
        lock.release()

    RunLock.acquire(tmp_path, sleep=until_it_is_gone).release()


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "has no locks; nothing keeps a second run out" in RunLock.acquire(tmp_path).note
