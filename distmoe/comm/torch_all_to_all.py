"""One variable-split all-to-all per transfer: the default on NCCL inside a node.

NCCL takes a list of buffers, so nothing is packed; the group is asked itself, as
`torch.distributed.all_to_all` looks at every one of them in Python, once a block and way. gloo has
uneven splits only for one packed buffer; there it is a baseline and a test of the contract, not a
fast path.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import Message, Transfer
from distmoe.comm.torch_group import TorchGroup, num_bytes, row_backend


class AllToAllExchange(TorchGroup):
    """all_to_all among the ranks of ``group``; receives are held back until the sends."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._takes_lists = row_backend(group) == "nccl"

    def _receive(self, transfer: Transfer) -> None:
        """The collective starts with the sends."""

    def _send(self, transfer: Transfer) -> None:
        recv, send = transfer.recv, transfer.send
        nothing = self._empty_like([*send.values(), *recv.values()])
        outputs = [recv.get(peer, nothing) for peer in range(self.size)]
        inputs = [send.get(peer, nothing) for peer in range(self.size)]
        if self._takes_lists:
            work = self.group.alltoall(outputs, inputs, _options())
        else:
            transfer.staging = nothing.new_empty(sum(output.numel() for output in outputs))
            work = dist.all_to_all_single(
                transfer.staging,
                torch.cat([rows.view(-1) for rows in inputs]),
                [output.numel() for output in outputs],
                [rows.numel() for rows in inputs],
                group=self.group,
                async_op=True,
            )
        size = sum(map(num_bytes, send.values()))
        transfer.arriving = [
            Message("exchange", None, size, work.wait, on_stream=self._takes_lists)
        ]

    def _empty_like(self, tensors: list[Tensor]) -> Tensor:
        if tensors:
            return tensors[0].new_empty(0)
        return torch.empty(0, device="cuda" if self._takes_lists else "cpu")

    def _received(self, transfer: Transfer) -> None:
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
        super().wait_send(transfer)


def _options() -> dist.AllToAllOptions:
    """Of a collective that runs on a stream of the group."""
    options = dist.AllToAllOptions()
    options.asyncOp = True
    return options
