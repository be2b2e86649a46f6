"""One variable-split all-to-all per transfer: the default on NCCL inside a node.

NCCL takes a list of buffers, so nothing is packed. gloo has uneven splits only for one packed
buffer; there it is a baseline and a test of the contract, not a fast path.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Transfer
from distmoe.comm.torch_group import TorchGroup


class AllToAllExchange(TorchGroup):
    """all_to_all among the ranks of ``group``; receives are held back until the sends."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._takes_lists = dist.get_backend(group) == "nccl"
        self._next_tag = 0

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        self.traffic.begin(kind)
        self._next_tag += 1
        return Transfer(kind=kind, tag=self._next_tag, recv=recv)

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        transfer.send = send
        for rows in send.values():
            self.traffic.add(transfer.kind, rows)
        nothing = self._empty_like([*send.values(), *transfer.recv.values()])
        outputs = [transfer.recv.get(peer, nothing).view(-1) for peer in range(self.size)]
        inputs = [send.get(peer, nothing).view(-1) for peer in range(self.size)]
        if self._takes_lists:
            work = dist.all_to_all(outputs, inputs, group=self.group, async_op=True)
        else:
            transfer.staging = nothing.new_empty(sum(output.numel() for output in outputs))
            work = dist.all_to_all_single(
                transfer.staging,
                torch.cat(inputs),
                [output.numel() for output in outputs],
                [rows.numel() for rows in inputs],
                group=self.group,
                async_op=True,
            )
        transfer.recv_work = [work]

    def _empty_like(self, tensors: list[Tensor]) -> Tensor:
        if tensors:
            return tensors[0].new_empty(0)
        return torch.empty(0, device="cuda" if self._takes_lists else "cpu")

    def wait_recv(self, transfer: Transfer) -> None:
        for work in transfer.recv_work:
            work.wait()
        transfer.recv_work = []
        if transfer.staging is not None:
            splits = [
                transfer.recv[p].numel() if p in transfer.recv else 0 for p in range(self.size)
            ]
            for peer, part in enumerate(torch.split(transfer.staging, splits)):
                if peer in transfer.recv:
                    transfer.recv[peer].view(-1).copy_(part)
            transfer.staging = None

    def wait_send(self, transfer: Transfer) -> None:
        self.wait_recv(transfer)
        transfer.send = {}
