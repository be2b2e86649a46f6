"""The exchange of one rank with itself: nothing travels."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Transfer
from distmoe.comm.transport import Transport


class LocalExchange(Transport):
    """P = 1. Posting rows to a peer is an error of the caller."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(0, [0 if group is None else dist.get_rank()])

    def _gather(self, x: Tensor) -> Tensor:
        return x[None]

    def _sum(self, x: Tensor) -> Tensor:
        return x

    def _receive(self, transfer: Transfer) -> None:
        if transfer.recv:
            raise AssertionError(f"one rank has no peers, got rows for {sorted(transfer.recv)}")

    def _send(self, transfer: Transfer) -> None:
        if transfer.send:
            raise AssertionError(f"one rank has no peers, got rows for {sorted(transfer.send)}")
