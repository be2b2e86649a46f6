"""Saves of several ranks: what one rank cannot write, no rank has saved."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import FullDisk
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distmoe.checkpoint.disk import Disk
from distmoe.checkpoint.load import load
from distmoe.checkpoint.manifest import read_manifest
from distmoe.checkpoint.store import SLOWEST_WRITE_S, CheckpointStore, checkpoint_group

WORLD = 3


def state(rank: int, step: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    rows = torch.full((2, 4), float(10 * rank + step))
    return {
        "model": {"w": DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)},
        f"rng_{rank}": {"cpu": torch.full((3,), rank)},
    }


def save_twice(rank: int, root: Path, full: int | None, at: int) -> Any:
    """Step 1, then step 2 with no space for rank ``full`` from its call ``at`` on."""
    group = checkpoint_group(timeout_s=60)
    sound = CheckpointStore(root, keep_last=1, asynchronous=False, group=group)
    sound.save(1, state(rank, 1))
    disk = FullDisk(at) if rank == full else Disk()
    store = CheckpointStore(root, keep_last=1, asynchronous=False, disk=disk, group=group)
    store.save(2, state(rank, 2))
    (report,) = store.reports()
    return report.error, store.saved_step, store.newest_sound()


def load_one(rank: int, root: Path, step: int) -> Any:
    found = load(root / f"step-{step:08d}", state(rank, 0))
    return found["model"]["w"].to_local().unique().tolist(), found[f"rng_{rank}"]["cpu"].tolist()


def test_the_group_waits_as_long_as_the_run_and_a_slow_disk_may_take() -> None:
    def timeouts(rank: int) -> list[timedelta]:
        groups = [checkpoint_group(timeout_s=seconds) for seconds in (77, 7700)]
        backends = [group._get_backend(torch.device("cpu")) for group in groups if group]
        return [backend.options._timeout for backend in backends]

    expected = [timedelta(seconds=SLOWEST_WRITE_S), timedelta(seconds=7700)]
    assert run_ranks(timeouts, 2, backend="gloo") == [expected] * 2


def test_all_ranks_are_in_the_manifest(tmp_path: Path) -> None:
    results = run_ranks(save_twice, WORLD, tmp_path, None, 0)
    path = tmp_path / "step-00000002"
    assert results == [("", 2, (path, {}))] * WORLD
    files = {f"__{rank}_0.distcp" for rank in range(WORLD)} | {".metadata"}
    assert set(read_manifest(path).files) == files
    assert {file.name for file in path.iterdir()} == files | {"manifest.json"}
    assert run_ranks(load_one, WORLD, tmp_path, 2) == [
        ([10.0 * rank + 2], [rank] * 3) for rank in range(WORLD)
    ]


@pytest.mark.parametrize("full", range(WORLD))
@pytest.mark.parametrize("at", [0, 3])
def test_a_rank_without_space_costs_all_of_them_the_save(
    tmp_path: Path, full: int, at: int
) -> None:
    results = run_ranks(save_twice, WORLD, tmp_path, full, at)
    error, saved_step, newest = results[0]
    assert error.startswith(f"rank {full}: [Errno 28] No space left on device")
    assert (saved_step, newest) == (-1, (tmp_path / "step-00000001", {}))
    assert all(result == results[0] for result in results)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
