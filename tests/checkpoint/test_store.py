"""Saves that are broken at every call, in one process; what is kept; what is found again."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import CountingDisk, FullDisk, Killed, KillingDisk
from ranks import run_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from distmoe.checkpoint.disk import Disk
from distmoe.checkpoint.load import load
from distmoe.checkpoint.manifest import damage, read_manifest
from distmoe.checkpoint.state_copy import StateCopy
from distmoe.checkpoint.store import CheckpointStore, step_of

# torch.distributed.checkpoint catches whatever is raised inside it; the disk stays dead.
KILLED = (Killed, RuntimeError)


def state(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((7, 5), float(step)), "bias_E": torch.arange(4) + step},
        "progress": {"done": step},
    }


def store(
    root: Path, disk: Disk | None = None, *, asynchronous: bool = False, **keep: int
) -> CheckpointStore:
    return CheckpointStore(
        root,
        group=None,
        **{"keep_last": 1, **keep},
        asynchronous=asynchronous,
        disk=disk,
        about={"world": 1},
    )


def steps(root: Path) -> list[int]:
    return [step_of(path) for path in store(root).complete()]


def loaded_step(root: Path) -> int:
    """The step of the newest sound checkpoint, after a look at every value."""
    path, _ = store(root).newest_sound()
    assert path is not None
    found = load(path, state(0))
    expected = state(step_of(path))
    assert found["progress"] == expected["progress"]
    assert all(torch.equal(found["model"][k], expected["model"][k]) for k in expected["model"])
    return step_of(path)


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    """The calls of a save that replaces another."""
    root, disk = tmp_path_factory.mktemp("calls"), CountingDisk()
    store(root).save(1, state(1))
    store(root, disk).save(2, state(2))
    return disk.calls


def test_a_kill_at_any_call_loses_nothing(calls: list[tuple[str, str]], tmp_path: Path) -> None:
    """Also if the save is the first one after a kill, with what that has left around."""
    assert {what for what, _ in calls} == {
        "open", "write", "sync", "sync folder", "rename", "mkdir", "remove", "rmdir",
    }  # fmt: skip
    found = []
    for at in range(len(calls)):
        root = tmp_path / str(at)
        store(root).save(1, state(1))
        with pytest.raises(KILLED):
            store(root, KillingDisk(at)).save(2, state(2))
        found.append(loaded_step(root))
        store(root).save(3, state(3))
        assert loaded_step(root) == 3
        assert [path.name for path in root.iterdir()] == ["step-00000003"]
    renamed = calls.index(("rename", "step-00000002"))
    assert found == [1] * (renamed + 1) + [2] * (len(calls) - renamed - 1)


def test_a_kill_while_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    for at in range(200):
        root, disk = tmp_path / str(at), KillingDisk(at)
        for step in (1, 2):
            store(root, keep_last=2).save(step, state(step))
        (root / "step-00000002" / ".metadata").unlink()
        try:
            store(root, disk, keep_last=2).save(2, state(2))
        except KILLED:
            assert loaded_step(root) in (1, 2)
            continue
        assert steps(root) == [1, 2]
        assert loaded_step(root) == 2
        return
    raise AssertionError("a save of more than 200 calls")


def test_everything_is_synced_before_it_gets_its_name(calls: list[tuple[str, str]]) -> None:
    renamed = calls.index(("rename", "step-00000002"))
    written = {name for what, name in calls if what == "write"}
    assert written == {"__0_0.distcp", ".metadata.tmp", "manifest.json"}
    for name in written:
        last_write = max(i for i, call in enumerate(calls) if call == ("write", name))
        assert last_write < calls.index(("sync", name)) < renamed
    folder_synced = calls.index(("sync folder", ".tmp-step-00000002"))
    assert calls.index(("sync", "manifest.json")) < folder_synced < renamed
    assert calls[renamed + 1][0] == "sync folder"
    assert ("rename", ".old-step-00000001") in calls[renamed + 2 :]


def test_files_are_synced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: dict[int, int] = {}

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced[found.st_ino] = found.st_size

    monkeypatch.setattr(os, "fsync", fsync)
    root = tmp_path / "checkpoints"
    store(root).save(1, state(1))
    files = list((root / "step-00000001").iterdir())
    assert len(files) == 3
    assert all(synced[file.stat().st_ino] == file.stat().st_size > 0 for file in files)
    for folder in (tmp_path, root, root / "step-00000001"):
        assert folder.stat().st_ino in synced


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_costs_the_save_only(
    calls: list[tuple[str, str]], tmp_path: Path, asynchronous: bool
) -> None:
    renamed = calls.index(("rename", "step-00000002"))
    for at in range(renamed):
        root = tmp_path / str(at)
        store(root).save(1, state(1))
        own = store(root, FullDisk(at), asynchronous=asynchronous)
        own.save(2, state(2))
        own.wait()
        (report,) = own.reports()
        assert report.error.startswith("rank 0: [Errno 28] No space left on device")
        assert (report.step, own.saved_step) == (2, -1)
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
        assert loaded_step(root) == 1


def test_an_error_that_is_not_of_the_disk_is_raised(tmp_path: Path) -> None:
    own = store(tmp_path, asynchronous=True)
    own.save(1, {"model": {"w": threading.Lock()}})
    with pytest.raises(RuntimeError, match="could not be written: rank 0: TypeError.*pickle"):
        own.wait()
    assert own.reports() == []
    assert list(tmp_path.iterdir()) == []


def test_the_state_may_change_as_soon_as_save_returns(tmp_path: Path) -> None:
    class SlowDisk(Disk):
        def open(self, path: Path) -> Any:
            time.sleep(0.1)
            return super().open(path)

    own, current = store(tmp_path, SlowDisk(), asynchronous=True, keep_last=3), state(1)
    for step in (1, 2, 3):
        current["progress"] = {"done": step}
        own.save(step, current)
        assert own.saved_step < step
        for tensor in current["model"].values():
            tensor += 1
    own.wait()
    assert [(report.step, report.error) for report in own.reports()] == [(1, ""), (2, ""), (3, "")]
    for step in (1, 2, 3):
        shutil.rmtree(tmp_path / f"step-{step + 1:08d}", ignore_errors=True)
    assert loaded_step(tmp_path) == 1


def test_the_state_copy_is_made_once() -> None:
    host, places = StateCopy(), []
    for step in (1, 2):
        copied = host.copy(state(step))["model"]
        places.append([tensor.data_ptr() for tensor in copied.values()])
        assert all(torch.equal(copied[k], tensor) for k, tensor in state(step)["model"].items())
    assert places[0] == places[1]
    for other in (torch.ones(3, 2), torch.ones(3, 2, dtype=torch.int32)):
        copied = host.copy({"model": {"w": other}})["model"]
        assert (copied["w"].dtype, copied["w"].tolist()) == (other.dtype, other.tolist())


def test_the_state_copy_of_a_sharded_gpu_is_in_host_memory() -> None:
    def copied(rank: int) -> tuple[Tensor, Tensor]:
        mesh, shape = DeviceMesh("cuda", [0, 1]), torch.Size((6, 4))
        local = torch.empty(3, 4, device="meta")
        like = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=shape, stride=(4, 1)
        )
        # A stand-in for the shard of a GPU; from_local would ask for one.
        sharded: Any = torch.zeros_like(like, device="cpu")
        sharded.to_local().copy_(torch.arange(12.0).view(3, 4) + rank)
        (held,) = StateCopy().copy({"w": sharded}).values()
        assert (held.shape, held.device_mesh, held.placements) == (shape, mesh, (Shard(0),))
        return sharded.to_local(), held.to_local()

    for given, held in run_ranks(copied, 2):
        assert held.device.type == "cpu"
        assert held.data_ptr() != given.data_ptr()
        assert torch.equal(held, given)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        ({"keep_last": 1}, [6]),
        ({"keep_last": 3}, [4, 5, 6]),
        ({"keep_last": 1, "keep_every": 2}, [2, 4, 6]),
        ({"keep_last": 2, "keep_every": 3}, [3, 5, 6]),
    ],
)
def test_what_is_kept(tmp_path: Path, keep: dict[str, int], left: list[int]) -> None:
    own = store(tmp_path, **keep)
    for step in range(1, 7):
        own.save(step, state(step))
    assert steps(tmp_path) == left


def test_a_run_that_went_back_keeps_its_own_checkpoint(tmp_path: Path) -> None:
    store(tmp_path).save(8, state(8))
    own = store(tmp_path)
    own.save(4, state(4))
    assert steps(tmp_path) == [4, 8]
    own.save(6, state(6))
    assert steps(tmp_path) == [6, 8]


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "a flipped bit": (_flip, "has another SHA-256 than when it was written"),
    "a cut": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "bytes instead of"),
    "a lost file": (Path.unlink, "is missing"),
}


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_one_before_is_found(tmp_path: Path, name: str, kind: str) -> None:
    own = store(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        own.save(step, state(step))
    newest = tmp_path / "step-00000003"
    break_it, words = DAMAGE[kind]
    break_it(newest / name)
    if name == "manifest.json" and kind != "a lost file":
        words = "manifest.json is damaged"
    path, damaged = own.newest_sound()
    assert path == tmp_path / "step-00000002"
    assert list(damaged) == [newest]
    assert words in damaged[newest][0]
    assert name in damaged[newest][0]


def test_a_run_never_starts_anew_over_damaged_checkpoints(tmp_path: Path) -> None:
    own = store(tmp_path)
    assert own.newest_sound() == (None, {})
    own.save(1, state(1))
    _flip(tmp_path / "step-00000001" / "__0_0.distcp")
    with pytest.raises(ValueError, match="no sound checkpoint is left in .*step-00000001: __0_0"):
        own.newest_sound()


def test_readers_share_the_files(tmp_path: Path) -> None:
    store(tmp_path).save(1, state(1))
    path = tmp_path / "step-00000001"
    for name in (".metadata", "__0_0.distcp"):
        _flip(path / name)
    assert len(damage(path)) == 2
    assert [len(damage(path, part=part, parts=2)) for part in range(2)] == [1, 1]


def test_a_manifest_of_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmoe.checkpoint.manifest.FORMAT", 9)
    store(tmp_path).save(1, state(1))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="of format 9; this version reads 1"):
        read_manifest(tmp_path / "step-00000001")
