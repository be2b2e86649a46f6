"""The groups of a mesh."""

from __future__ import annotations

from datetime import timedelta

import torch
from ranks import run_ranks

from distmoe.config import ParallelConfig
from distmoe.mesh import build_mesh


def test_no_group_waits_longer_than_the_run_allows() -> None:
    def timeouts(rank: int) -> list[timedelta]:
        parallel = ParallelConfig(dp_replicate=1, dp_shard=4, ep=2)
        mesh = build_mesh(parallel, device_type="cpu", timeout_s=77.0)
        groups = [*mesh.dense.get_all_groups(), *mesh.sparse.get_all_groups(), mesh.ep_group]
        backends = [group._get_backend(torch.device("cpu")) for group in groups if group]
        return [backend.options._timeout for backend in backends]

    for found in run_ranks(timeouts, 4, backend="gloo"):
        assert found == [timedelta(seconds=77)] * 6
