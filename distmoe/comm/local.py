"""The exchange of one rank with itself: nothing travels."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Traffic, Transfer


class LocalExchange:
    """P = 1. Posting rows to a peer is an error of the caller."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size = 0, 1
        self.traffic = Traffic()

    def all_gather(self, x: Tensor, *, kind: str) -> Tensor:
        return x[None]

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        return self._nothing(Transfer(kind=kind, tag=0, recv=recv), recv)

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        self._nothing(transfer, send)

    @staticmethod
    def _nothing(transfer: Transfer, rows: Mapping[int, Tensor]) -> Transfer:
        if rows:
            raise AssertionError(f"one rank has no peers, got rows for {sorted(rows)}")
        return transfer

    def wait_recv(self, transfer: Transfer) -> None:
        """Nothing is ever on its way."""

    def wait_send(self, transfer: Transfer) -> None:
        """Nothing is ever on its way."""
