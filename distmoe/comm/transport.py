"""What all transports share: accounting, and waits that are observed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from distmoe.comm import Message, Observer, Traffic, Transfer
from distmoe.comm.traffic import Distance


class Transport:
    """An `Exchange` but for five methods. ``_receive`` and ``_send`` start a transfer's messages
    and put them into ``arriving`` and ``leaving``; ``_received`` unpacks what has arrived;
    ``_gather`` and ``_sum`` are the blocking all-gather and all-reduce.

    ``world_ranks``: for every place in the group the rank in the run, by which messages name it.
    """

    def __init__(self, rank: int, world_ranks: Sequence[int]) -> None:
        self.rank, self.size = rank, len(world_ranks)
        self.ranks_per_node = 0
        self.traffic = Traffic()
        self.observer = Observer(rank, world_ranks)
        self._next_tag = 0

    def _receive(self, transfer: Transfer) -> None:
        raise NotImplementedError

    def _send(self, transfer: Transfer) -> None:
        raise NotImplementedError

    def _received(self, transfer: Transfer) -> None:
        """Most transports receive into the buffers themselves."""

    def _gather(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _sum(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def all_gather(self, x: Tensor, *, kind: str) -> Tensor:
        return self._collective(kind, lambda: self._gather(x), [x.nbytes] * self.size)

    def all_reduce(self, x: Tensor, *, kind: str) -> Tensor:
        parts = [part.nbytes for part in x.reshape(-1).tensor_split(self.size)]
        # A peer is sent the addends of its part, and the sums of the own one.
        sent = [part + parts[self.rank] for part in parts]
        return self._collective(kind, lambda: self._sum(x), sent)

    def _collective(self, kind: str, run: Callable[[], Tensor], sent: Sequence[int]) -> Tensor:
        """``sent``: bytes to each rank."""
        self.traffic.begin(kind)
        self.observer.begun(kind)
        for peer in range(self.size):
            if peer != self.rank:
                self.traffic.add(kind, sent[peer], self._distance(peer))
        num_bytes = sum(sent) - sent[self.rank]
        results: list[Tensor] = []
        self.observer.gather(
            kind, Message("exchange", None, num_bytes, lambda: results.append(run()))
        )
        return results[0]

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        self.traffic.begin(kind)
        self.observer.begun(kind)
        transfer = Transfer(kind=kind, tag=self._next_tag, recv=recv)
        self._next_tag += 1
        with self.observer.posting(kind):
            self._receive(transfer)
        return transfer

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        transfer.send = send
        for peer, rows in send.items():
            self.traffic.add(transfer.kind, rows.nbytes, self._distance(peer))
        with self.observer.posting(transfer.kind):
            self._send(transfer)
        self.observer.posted(transfer.kind, [*transfer.arriving, *transfer.leaving])

    def wait_recv(self, transfer: Transfer) -> None:
        self.observer.wait(transfer.kind, transfer.arriving)
        transfer.arriving = []
        self._received(transfer)

    def wait_send(self, transfer: Transfer) -> None:
        self.observer.wait(transfer.kind, transfer.leaving)
        transfer.leaving = []
        transfer.send = {}

    def _distance(self, peer: int) -> Distance:
        per_node = self.ranks_per_node or self.size
        return "node" if peer // per_node == self.rank // per_node else "remote"
