"""The axes dp_replicate, dp_shard, ep, efsdp and cp, and their groups.

world = dp_replicate * dp_shard and dp_shard = efsdp * ep over the same ranks; ep is innermost, so
that the ranks that exchange tokens are neighbours. So is cp, once more over the same ranks: those
that share sequences hold different shards of all parameters, whose gradients are summed over tokens
wherever these are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from distmoe.comm.context import ContextPart
from distmoe.comm.torch_group import limit_waits, new_row_group
from distmoe.config import ParallelConfig


@dataclass(frozen=True)
class Mesh:
    """``dense``: FSDP axes of dense parameters. ``sparse``: (dp_replicate, efsdp, ep).
    ``ep_group``: ranks that share the experts, None for ep = 1: a communicator of their own, on
    which nothing but tokens travels. ``cp_group``: ranks that share sequences, None for cp = 1, on
    a communicator of their own."""

    dense: DeviceMesh
    sparse: DeviceMesh
    ep_group: dist.ProcessGroup | None
    cp_group: dist.ProcessGroup | None

    @property
    def dense_group(self) -> dist.ProcessGroup:
        """Ranks that hold distinct shards of everything: dp_shard."""
        return self.dense["dp_shard"].get_group()

    @property
    def ep_rank(self) -> int:
        return int(self.sparse["ep"].get_local_rank())

    @property
    def efsdp_size(self) -> int:
        return int(self.sparse["efsdp"].size())

    @property
    def fsdp(self) -> DeviceMesh:
        """Axes over which dense parameters are sharded, and replicated if dp_replicate > 1."""
        return self.dense if self._replicated else self.dense["dp_shard"]

    @property
    def expert_fsdp(self) -> DeviceMesh:
        """The same for the parameters of one rank's experts."""
        return self.sparse["dp_replicate", "efsdp"] if self._replicated else self.sparse["efsdp"]

    @property
    def _replicated(self) -> bool:
        return bool(self.sparse["dp_replicate"].size() > 1)

    def describe(self) -> str:
        """One line, such as "8 ranks = dp_replicate 1 x efsdp 2 x ep 4, sequences over cp 2"."""
        sizes = [f"{axis} {self.sparse[axis].size()}" for axis in ("dp_replicate", "efsdp", "ep")]
        sequences = ""
        if self.cp_group is not None:
            sequences = f", sequences over cp {dist.get_world_size(self.cp_group)}"
        return f"{self.sparse.size()} ranks = {' x '.join(sizes)}{sequences}"


def build_mesh(
    parallel: ParallelConfig, *, device_type: str, timeout_s: float | None = None
) -> Mesh:
    """Both views of the ranks of the default process group; collective. ``timeout_s``: how long
    anything may wait for a peer; by default as long as torch lets a new group wait."""
    replicate, shard, ep = parallel.dp_replicate, parallel.dp_shard, parallel.ep
    dense = init_device_mesh(
        device_type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")
    )
    sparse = init_device_mesh(
        device_type, (replicate, shard // ep, ep), mesh_dim_names=("dp_replicate", "efsdp", "ep")
    )
    if timeout_s is not None:
        for group in (*dense.get_all_groups(), *sparse.get_all_groups()):
            limit_waits(group, timeout_s)
    return Mesh(dense, sparse, _ep_group(sparse, timeout_s), _cp_group(parallel.cp, timeout_s))


def _ep_group(sparse: DeviceMesh, timeout_s: float | None) -> dist.ProcessGroup | None:
    if sparse["ep"].size() == 1:
        return None
    ranks = dist.get_process_group_ranks(sparse["ep"].get_group())
    return new_row_group(ranks, timeout_s=timeout_s)


def _cp_group(cp: int, timeout_s: float | None) -> dist.ProcessGroup | None:
    if cp == 1:
        return None
    rank = dist.get_rank()
    first = rank - ContextPart.of_rank(rank, cp).rank
    return new_row_group(range(first, first + cp), timeout_s=timeout_s)
