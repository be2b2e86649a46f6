"""Sums over the ranks of a group that travel while other work goes on."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from distmoe.comm.message import Message
from distmoe.comm.observer import Observer
from distmoe.comm.torch_group import num_bytes, row_backend


class PendingSum:
    """A sum that was posted. Every rank may wait for it as late as it likes, or never."""

    def __init__(self, kind: str, summed: Tensor, message: Message, observer: Observer) -> None:
        self._kind, self._summed, self._observer = kind, summed, observer
        self._message: Message | None = message

    def wait(self) -> Tensor:
        """Block until the sum is here (on CUDA: until the stream may read it); again is free."""
        if self._message is not None:
            self._observer.wait(self._kind, [self._message])
            self._message = None
        return self._summed


class GroupSum:
    """All-reduces of small tensors over ``group``, posted in the same order by all of its ranks.

    ``observer`` sees every wait. Bytes are not counted: the backend decides how many there are.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        ranks = dist.get_process_group_ranks(group)
        self.size = len(ranks)
        self.observer = Observer(dist.get_rank(group), ranks)

    def post(self, kind: str, x: Tensor) -> PendingSum:
        """Begin to add up ``x``, which is not changed; collective, and waits for nobody."""
        self.observer.begun(kind)
        summed = x.clone()
        with self.observer.posting(kind):
            work = dist.all_reduce(summed, group=self._group, async_op=True)
        if work is None:
            raise AssertionError("this rank is not in the group whose sum it asks for")
        on_stream = x.is_cuda and row_backend(self._group) == "nccl"
        message = Message("exchange", None, num_bytes(x), work.wait, on_stream=on_stream)
        self.observer.posted(kind, [message])
        return PendingSum(kind, summed, message, self.observer)
