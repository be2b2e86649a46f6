"""What users of a torch.distributed group share: its default, its ranks, and a small gather."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Traffic


def several_ranks(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """``group``, by default all ranks if a process group exists; None where it is one rank."""
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    return None if group is None or dist.get_world_size(group) == 1 else group


class TorchGroup:
    """``rank`` and ``size`` in ``group``, and an all-gather of small integer tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.traffic = Traffic()

    def all_gather(self, x: Tensor, *, kind: str) -> Tensor:
        self.traffic.begin(kind)
        for _ in range(self.size - 1):
            self.traffic.add(kind, x)
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.contiguous(), group=self.group)
        return torch.stack(gathered)
