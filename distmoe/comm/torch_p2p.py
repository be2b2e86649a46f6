"""Point-to-point transfers of torch.distributed: the default on gloo.

On gloo the receives are posted at once, before the sends: a receive that waits behind the own
payload halves the bandwidth of messages above 1 MB. On NCCL a receive alone would block the
communicator's stream, so receives and sends go out together as one group of operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Message, Transfer
from distmoe.comm.message import Way
from distmoe.comm.torch_group import TorchGroup, num_bytes, row_backend


class PointToPointExchange(TorchGroup):
    """isend and irecv between the ranks of ``group``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._batched = row_backend(group) == "nccl"
        self._peers = dist.get_process_group_ranks(group)

    def _receive(self, transfer: Transfer) -> None:
        if not self._batched:
            transfer.arriving = self._start("receive", transfer.recv, transfer.tag)

    def _send(self, transfer: Transfer) -> None:
        if self._batched:
            self._post_together(transfer)
        else:
            transfer.leaving = self._start("send", transfer.send, transfer.tag)

    def _start(self, way: Way, rows_of: Mapping[int, Tensor], tag: int) -> list[Message]:
        operation = dist.isend if way == "send" else dist.irecv
        messages = []
        for peer, rows in rows_of.items():
            work = operation(rows, self._peers[peer], self.group, tag)
            if work is None:
                raise AssertionError("this rank is not in the group that it exchanges rows with")
            messages.append(Message(way, peer, num_bytes(rows), work.wait))
        return messages

    def _post_together(self, transfer: Transfer) -> None:
        ops = [
            dist.P2POp(dist.irecv, buffer, self._peers[peer], self.group)
            for peer, buffer in transfer.recv.items()
        ]
        ops += [
            dist.P2POp(dist.isend, rows, self._peers[peer], self.group)
            for peer, rows in transfer.send.items()
        ]
        size = sum(map(num_bytes, transfer.send.values()))
        works = dist.batch_isend_irecv(ops) if ops else []
        transfer.arriving = [
            Message("exchange", None, size, work.wait, on_stream=True) for work in works
        ]

    def wait_send(self, transfer: Transfer) -> None:
        if self._batched:
            # One group of operations: the sends are complete when the receives are.
            self.wait_recv(transfer)
        super().wait_send(transfer)
