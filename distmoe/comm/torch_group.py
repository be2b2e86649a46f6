"""What users of a torch.distributed group share: its default, its ranks, and a small gather."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm.transport import Transport


def several_ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """``group``, by default all ranks if a process group exists; None where it is one rank."""
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    return None if group is None or dist.get_world_size(group) == 1 else group


class TorchGroup(Transport):
    """A transport over ``group``, whose all-gather is torch's own."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_process_group_ranks(group))
        self.group = group

    def _gather(self, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        return torch.stack(gathered)


def num_bytes(rows: Tensor) -> int:
    """Bytes that ``rows`` has on the wire."""
    return rows.numel() * rows.element_size()
