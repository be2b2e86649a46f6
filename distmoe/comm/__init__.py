"""Bytes between the ranks of one group. Knows rows, counts and peers, never experts.

A *transfer* is one exchange of rows in which every rank of the group takes part: it first posts
the buffers that it will receive into, then the rows that it sends, each exactly once and in the
same order of transfers on every rank; either may be empty. A transport may start receiving at
``post_recv`` (point-to-point on gloo) or hold the receives back until ``post_send`` (one
collective on NCCL). Nothing waits but ``wait_recv`` and ``wait_send``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from distmoe.comm.message import Message
from distmoe.comm.observer import Observer
from distmoe.comm.traffic import Traffic
from distmoe.registry import EXCHANGES

__all__ = ["Exchange", "Message", "Observer", "Traffic", "Transfer", "make_exchange"]


@dataclass
class Transfer:
    """One exchange in flight. Keeps the buffers of both sides alive until it is complete.

    ``arriving`` and ``leaving``: its messages that nobody has waited for yet.
    """

    kind: str
    tag: int
    recv: Mapping[int, Tensor]
    send: Mapping[int, Tensor] = field(default_factory=dict)
    staging: Tensor | None = None
    arriving: list[Message] = field(default_factory=list)
    leaving: list[Message] = field(default_factory=list)


class Exchange(Protocol):
    """One transport over one group. ``rank`` and ``size`` are places in the group.

    ``ranks_per_node``: the group's ranks lie on nodes in runs of so many; 0: all on one node.
    """

    rank: int
    size: int
    ranks_per_node: int
    traffic: Traffic
    observer: Observer

    def all_gather(self, x: Tensor, *, kind: str) -> Tensor:
        """[P, *x.shape] from x of one shape and dtype on every rank; blocks. Traffic counts by
        ``kind``."""
        ...

    def all_reduce(self, x: Tensor, *, kind: str) -> Tensor:
        """The sum over the ranks of x of one shape and dtype; blocks. Traffic counts by ``kind``
        what a reduce-scatter and an all-gather send."""
        ...

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        """Begin a transfer: peer -> contiguous buffer. Peers without rows are left out."""
        ...

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        """Send peer -> contiguous rows. Traffic counts by ``kind`` ("rows", "pairs", ...)."""
        ...

    def wait_recv(self, transfer: Transfer) -> None:
        """Block until the receive buffers are filled (on CUDA: until the stream may read them).
        TimeoutError, naming the missing ranks, after ``observer.timeout_s``."""
        ...

    def wait_send(self, transfer: Transfer) -> None:
        """Block until the sent rows may be overwritten."""
        ...


def exchange_now(
    exchange: Exchange, kind: str, recv: Mapping[int, Tensor], send: Mapping[int, Tensor]
) -> None:
    """One transfer that is waited for: fills ``recv``, sends ``send``; empty parts are left out."""
    transfer = exchange.post_recv(kind, not_empty(recv))
    exchange.post_send(transfer, not_empty(send))
    exchange.wait_recv(transfer)
    exchange.wait_send(transfer)


def not_empty(parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Ranks without rows are left out of a transfer."""
    return {peer: part for peer, part in parts.items() if part.numel()}


def make_exchange(
    group: dist.ProcessGroup | None, name: str = "auto", *, ranks_per_node: int = 0
) -> Exchange:
    """The transport ``name`` over ``group``; ``auto`` picks by size and backend of the group."""
    if name == "auto":
        name = _auto(group)
    exchange: Exchange = EXCHANGES.load(name)(group)
    exchange.ranks_per_node = ranks_per_node
    return exchange


def _auto(group: dist.ProcessGroup | None) -> str:
    if group is None or dist.get_world_size(group) == 1:
        return "local"
    # Imported here, as transports import this package.
    from distmoe.comm.torch_group import row_backend

    backend = row_backend(group)
    return {"nccl": "all_to_all", "threaded": "threaded"}.get(backend, "p2p")
