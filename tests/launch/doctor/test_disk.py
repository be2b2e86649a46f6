"""Room and speed of folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch_doctor import like

from distmoe.config import Config, DataConfig, RunConfig
from distmoe.launch.doctor import disk
from distmoe.launch.doctor.examine import finding_of
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]


def test_disks(situation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "PROBE_BYTES", 1 << 20)
    # What else the machine writes is of no interest.
    monkeypatch.setattr(disk, "SLOW_BYTES_PER_S", 0.0)
    config = Config(run=RunConfig(dir=str(tmp_path / "a/b")), data=DataConfig(path=str(tmp_path)))
    found = situation(config=config)
    assert like(disk.run_room(found), "pass", f"GiB free in {tmp_path}")
    assert disk.run_speed(found).seen.endswith("for a small sync")
    assert list(tmp_path.iterdir()) == []
    assert like(disk.data_speed(found), "skip", "there is no shard")
    (tmp_path / "train-0.bin").write_bytes(b"0" * 4096)
    assert like(disk.data_speed(found), "pass", "0.0 MB of train-0.bin")
    few = SimpleNamespace(free=1 << 20)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: few)
    assert like(disk.run_room(found), "warn", "0.0 GiB free")
    assert like(disk.temporary(found), "warn", "0.0 GiB free")
    monkeypatch.setattr(disk, "SLOW_BYTES_PER_S", float("inf"))
    assert like(disk.run_speed(found), "warn", str(tmp_path))
    # Opening a small file is no measure of reading.
    assert disk.data_speed(found).status == "pass"
    (tmp_path / "train-0.bin").write_bytes(b"0" * len(disk.CHUNK))
    assert like(disk.data_speed(found), "warn", "4.2 MB of train-0.bin")
    monkeypatch.setattr(disk.os, "fsync", lambda file: os.close(-1))
    assert like(disk.run_speed(found), "fail", "Bad file descriptor")
    assert like(finding_of(disk.data_room, situation()), "skip", "no FILE")


def test_disks_of_a_mix(situation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disk, "PROBE_BYTES", 2 * len(disk.CHUNK))
    web, code = tmp_path / "web", tmp_path / "code"
    data = DataConfig(path="nowhere", mix=(f"{web}:3", f"{code}:1"))
    found = situation(config=Config(data=data))
    web.mkdir()
    (web / "train-0.bin").write_bytes(b"0" * 3 * len(disk.CHUNK))
    assert like(disk.data_room(found), "skip", f"there is no {code}")
    code.mkdir()
    assert like(disk.data_speed(found), "skip", f"there is no shard in {code}")
    (code / "train-1.bin").write_bytes(b"0" * 4096)
    # Both together read no more than one folder alone.
    first, second = disk.data_speed(found).seen.split("; ")
    assert first.endswith(f"MB/s, 4.2 MB of {web}/train-0.bin")
    assert second.endswith(f"MB/s, 0.0 MB of {code}/train-1.bin")
    assert like(disk.data_room(found), "pass", f"GiB free in {web}, {code}")
    # On two file systems.
    whole = Path.stat
    device = {web: 1, code: 2}
    monkeypatch.setattr(
        Path,
        "stat",
        lambda path, **options: SimpleNamespace(
            st_mode=whole(path, **options).st_mode, st_dev=device.get(path, 0)
        ),
    )
    monkeypatch.setattr(
        disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=device[path] << 30)
    )
    assert disk.data_room(found).seen == f"1.0 GiB free in {web}; 2.0 GiB free in {code}"


@pytest.mark.parametrize(("free", "status"), [(1 << 30, "pass"), (64 << 20, "warn")])
def test_shared_memory(
    situation: Make, monkeypatch: pytest.MonkeyPatch, free: int, status: str
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: (2 << 30, 0, free))
    assert like(disk.shared_memory(situation()), status, "of 2.00 GiB free")
