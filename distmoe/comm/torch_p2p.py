"""Point-to-point transfers of torch.distributed: the default on gloo.

On gloo the receives are posted at once, before the sends: a receive that waits behind the own
payload halves the bandwidth of messages above 1 MB. On NCCL a receive alone would block the
communicator's stream, so receives and sends go out together as one group of operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Transfer
from distmoe.comm.torch_group import TorchGroup


class PointToPointExchange(TorchGroup):
    """isend and irecv between the ranks of ``group``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._batched = dist.get_backend(group) == "nccl"
        self._peers = dist.get_process_group_ranks(group)
        self._next_tag = 0

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        self.traffic.begin(kind)
        transfer = Transfer(kind=kind, tag=self._next_tag, recv=recv)
        self._next_tag += 1
        if not self._batched:
            transfer.recv_work = [
                self._work(dist.irecv(buffer, self._peers[peer], self.group, transfer.tag))
                for peer, buffer in recv.items()
            ]
        return transfer

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        transfer.send = send
        for rows in send.values():
            self.traffic.add(transfer.kind, rows)
        if self._batched:
            self._post_together(transfer)
        else:
            transfer.send_work = [
                self._work(dist.isend(rows, self._peers[peer], self.group, transfer.tag))
                for peer, rows in send.items()
            ]

    def _post_together(self, transfer: Transfer) -> None:
        ops = [
            dist.P2POp(dist.irecv, buffer, self._peers[peer], self.group)
            for peer, buffer in transfer.recv.items()
        ]
        ops += [
            dist.P2POp(dist.isend, rows, self._peers[peer], self.group)
            for peer, rows in transfer.send.items()
        ]
        transfer.recv_work = dist.batch_isend_irecv(ops) if ops else []

    @staticmethod
    def _work(work: dist.Work | None) -> dist.Work:
        if work is None:
            raise AssertionError("this rank is not in the group that it exchanges rows with")
        return work

    def wait_recv(self, transfer: Transfer) -> None:
        for work in transfer.recv_work:
            work.wait()
        transfer.recv_work = []

    def wait_send(self, transfer: Transfer) -> None:
        for work in transfer.send_work:
            work.wait()
        transfer.send_work = []
        if self._batched:
            # One group of operations: the sends are complete when the receives are.
            self.wait_recv(transfer)
        for rows in transfer.send.values():
            if rows.is_cuda:
                rows.record_stream(torch.cuda.current_stream())
        transfer.send = {}
