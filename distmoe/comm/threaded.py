"""Ranks as threads of one process: rows pass through a mailbox. For tests.

torch's threaded process group has collectives but no point-to-point.
"""

from __future__ import annotations

import itertools
import threading
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Message, Transfer
from distmoe.comm.torch_group import TorchGroup, num_bytes

# Exchange, source, target, tag.
Address = tuple[int, int, int, int]

_arrived = threading.Condition()
_mail: dict[Address, Tensor] = {}
_fresh_numbers = itertools.count()


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

    def _address(self, source: int, target: int, tag: int) -> Address:
        return (self._number, source, target, tag)

    def _receive(self, transfer: Transfer) -> None:
        for peer, buffer in transfer.recv.items():
            take = partial(self._take, peer, buffer, transfer.tag)
            transfer.arriving.append(Message("receive", peer, num_bytes(buffer), take))

    def _send(self, transfer: Transfer) -> None:
        with _arrived:
            for peer, rows in transfer.send.items():
                _mail[self._address(self.rank, peer, transfer.tag)] = rows.clone()
            _arrived.notify_all()

    def _take(self, peer: int, buffer: Tensor, tag: int) -> None:
        address, limit = self._address(peer, self.rank, tag), self.observer.timeout_s
        with _arrived:
            if not _arrived.wait_for(lambda: address in _mail, limit):
                raise TimeoutError(f"nothing from rank {peer} in {limit:g} s")
            rows = _mail.pop(address)
        # A real transport would not convert them.
        if (rows.shape, rows.dtype) != (buffer.shape, buffer.dtype):
            raise AssertionError(
                f"expected {buffer.dtype} {tuple(buffer.shape)} from {peer}, got {rows.dtype} "
                f"{tuple(rows.shape)}"
            )
        buffer.copy_(rows)
