"""The run of a file against the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from launch_doctor import DEVICE, Answers, like, torch_with

from distmoe.config import CheckpointConfig, Config, ConfigError, DataConfig, RunConfig
from distmoe.launch.doctor import run
from distmoe.launch.doctor.examine import finding_of
from distmoe.launch.doctor.situation import Situation

Make = Callable[..., Situation]


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "status", "words"),
    [
        ("cpu", 0, 2, "pass", "2 ranks on this machine, on the CPU"),
        ("auto", 0, 2, "pass", "as there is no GPU"),
        ("auto", 2, 2, "pass", "2 ranks on this machine, 2 GPUs"),
        ("cuda", 1, 2, "fail", "2 ranks on this machine, 1 GPUs"),
        ("auto", 8, 2, "warn", "2 ranks on this machine, 8 GPUs"),
    ],
)
def test_ranks_and_devices(
    situation: Make, device: Any, gpus: int, ranks: int, status: str, words: str
) -> None:
    config = Config(run=RunConfig(device=device))
    found = situation(config=config, local_world=ranks, probes=torch_with(*[DEVICE] * gpus))
    assert like(run.ranks_and_devices(found), status, words)


def test_a_run(situation: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for check in run.CHECKS.values():
        assert like(finding_of(check, situation()), "skip", "no FILE")
    config = Config(
        run=RunConfig(dir=str(tmp_path)),
        data=DataConfig(path=str(tmp_path)),
        checkpoint=CheckpointConfig(keep_last=2, keep_every=50),
    )
    found = situation(config=config, probes=Answers(parameters={"count": 1 << 20}))
    assert like(run.settings(found), "fail", "no manifest.json")
    assert like(run.data(found), "fail", "no manifest.json")
    # Steps 50 to 200 for ever, two, and the one that is being written: 7 x 12 MiB.
    room = SimpleNamespace(free=7 * 12 << 20)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda folder: room)
    assert like(run.checkpoints(found), "pass", "about 0.082 GiB: 7 of 1.05 M parameters")
    room.free -= 1
    assert like(run.checkpoints(found), "fail", "0.1 GiB free")
    many = ConfigError(["moe.top_k is 9; it must be less", "b", "c"])
    monkeypatch.setattr(run, "check", lambda *args, **options: (_ for _ in ()).throw(many))
    assert like(run.settings(found), "fail", "moe.top_k is 9; it must be less (and 2 more)")
    monkeypatch.setattr(run, "check", lambda *args, **options: None)
    assert like(run.settings(found), "pass", "possible with 1 ranks")


def prepared(folder: Path) -> Path:
    """``folder`` with a shard of 4 tokens."""
    from distmoe.data.manifest import Manifest, Shard, Totals, make_split, write_manifest

    folder.mkdir()
    shard = Shard("train-0", 4, 1, 8, "")
    np.arange(4, dtype="<u2").tofile(folder / "train-0.bin")
    np.array([0, 4], dtype="<u8").tofile(folder / "train-0.idx")
    splits = {"train": make_split((shard,))}
    write_manifest(
        folder,
        Manifest(1, "uint16", 8, "<eod>", 0, "", splits, (), Totals(4, 1, 9), {}),
    )
    return folder


def test_tiles(situation: Make) -> None:
    def found(**answer: Any) -> Situation:
        probes = Answers(tiles={"kernel": "triton", "wrong": "", **answer})
        return situation(config=Config(), probes=probes)

    assert like(run.tiles(found(old=False, seen="defaults")), "pass", "defaults")
    assert like(run.tiles(found(old=True, seen="measured with triton 3.6.0")), "warn", "3.6.0")
    wrong = found(wrong="device is 'NVIDIA H100'")
    assert like(run.tiles(wrong), "fail", "moe.kernel_tiles: device is 'NVIDIA H100'")
    assert like(run.tiles(found(kernel="torch")), "skip", "moe.kernel torch has none")
    assert like(finding_of(run.tiles, situation(config=Config())), "skip", "no answer")


def test_data(situation: Make, tmp_path: Path) -> None:
    web, code = prepared(tmp_path / "web"), prepared(tmp_path / "code")
    one = situation(config=Config(data=DataConfig(path=str(web))))
    assert like(run.data(one), "pass", "4 tokens in 1 shards, all")
    mix = (f"{web}:3", f"{code}:1")
    two = situation(config=Config(data=DataConfig(path="nowhere", mix=mix)))
    assert like(run.data(two), "pass", "8 tokens in 2 shards of 2 folders, all")
    (code / "train-0.bin").write_bytes(b"12")
    assert like(run.data(two), "fail", "train-0.bin is 2 bytes long")
    assert run.data(one).status == "pass"
    wrong = situation(config=Config(data=DataConfig(mix=(str(web),))))
    assert like(run.data(wrong), "fail", f"data.mix has '{web}'; it must be FOLDER:WEIGHT")
    assert run.data(wrong).fix.startswith("data.mix")
