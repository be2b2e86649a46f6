"""The groups of a mesh."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from ranks import run_ranks

from distmoe.config import ParallelConfig
from distmoe.mesh import build_mesh


def test_no_group_waits_longer_than_the_run_allows() -> None:
    def timeouts(rank: int) -> list[timedelta]:
        parallel = ParallelConfig(dp_replicate=1, dp_shard=4, ep=2, cp=2)
        mesh = build_mesh(parallel, device_type="cpu", timeout_s=77.0)
        groups = [*mesh.dense.get_all_groups(), *mesh.sparse.get_all_groups()]
        groups += [mesh.ep_group, mesh.cp_group]
        backends = [group._get_backend(torch.device("cpu")) for group in groups if group]
        return [backend.options._timeout for backend in backends]

    for found in run_ranks(timeouts, 4, backend="gloo"):
        assert found == [timedelta(seconds=77)] * 7


def test_neighbours_share_sequences() -> None:
    def cp_ranks(rank: int) -> tuple[list[int], str]:
        mesh = build_mesh(ParallelConfig(dp_replicate=2, dp_shard=2, cp=2), device_type="cpu")
        return dist.get_process_group_ranks(mesh.cp_group), mesh.describe()

    for rank, (ranks, said) in enumerate(run_ranks(cp_ranks, 4)):
        assert ranks == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert said == "4 ranks = dp_replicate 2 x efsdp 2 x ep 1, sequences over cp 2"
