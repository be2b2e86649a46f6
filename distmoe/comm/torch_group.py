"""What transports on torch.distributed share: the place in the group, and the small gather."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Traffic


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
