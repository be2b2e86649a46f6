"""Ranks as threads of one process: rows pass through a mailbox. For tests.

torch's threaded process group has collectives but no point-to-point.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Transfer
from distmoe.comm.torch_group import TorchGroup

# Exchange, source, target, tag.
Address = tuple[int, int, int, int]

_arrived = threading.Condition()
_mail: dict[Address, Tensor] = {}
_fresh_numbers = itertools.count()

TIMEOUT_S = 60.0


class ThreadedExchange(TorchGroup):
    """Exchanges over one group are made in the same order by all of its ranks: collective."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        # Agreed by all ranks and never used twice, so that mail which a failed test left behind
        # reaches nobody. The device is named because models are built under a meta device.
        offers = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.size)]
        offer = torch.tensor([next(_fresh_numbers)], device="cpu")
        dist.all_gather(offers, offer, group=group)
        self._number = int(offers[0])
        self._next_tag = 0

    def _address(self, source: int, target: int, tag: int) -> Address:
        return (self._number, source, target, tag)

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        self.traffic.begin(kind)
        self._next_tag += 1
        return Transfer(kind=kind, tag=self._next_tag, recv=recv)

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        with _arrived:
            for peer, rows in send.items():
                self.traffic.add(transfer.kind, rows)
                _mail[self._address(self.rank, peer, transfer.tag)] = rows.clone()
            _arrived.notify_all()

    def wait_recv(self, transfer: Transfer) -> None:
        for peer, buffer in transfer.recv.items():
            address = self._address(peer, self.rank, transfer.tag)
            with _arrived:
                if not _arrived.wait_for(lambda a=address: a in _mail, TIMEOUT_S):  # type: ignore[misc]
                    raise TimeoutError(f"no {transfer.kind} from rank {peer} in {TIMEOUT_S} s")
                rows = _mail.pop(address)
            if rows.shape != buffer.shape:
                raise AssertionError(f"expected {buffer.shape} from {peer}, got {rows.shape}")
            buffer.copy_(rows)
        transfer.recv = {}

    def wait_send(self, transfer: Transfer) -> None:
        transfer.send = {}
