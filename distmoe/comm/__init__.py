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

from distmoe.registry import EXCHANGES


@dataclass
class Traffic:
    """Bytes that this rank has sent to other ranks, by kind of message; own rows never count.
    ``rounds``: all-gathers and transfers, in each of which every rank takes part."""

    bytes_sent: dict[str, int] = field(default_factory=dict)
    messages_sent: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)

    def begin(self, kind: str) -> None:
        self.rounds[kind] = self.rounds.get(kind, 0) + 1

    def add(self, kind: str, rows: Tensor) -> None:
        if rows.numel():
            num_bytes = rows.numel() * rows.element_size()
            self.bytes_sent[kind] = self.bytes_sent.get(kind, 0) + num_bytes
            self.messages_sent[kind] = self.messages_sent.get(kind, 0) + 1


@dataclass
class Transfer:
    """One exchange in flight. Keeps the buffers of both sides alive until it is complete."""

    kind: str
    tag: int
    recv: Mapping[int, Tensor]
    send: Mapping[int, Tensor] = field(default_factory=dict)
    staging: Tensor | None = None
    recv_work: list[dist.Work] = field(default_factory=list)
    send_work: list[dist.Work] = field(default_factory=list)


class Exchange(Protocol):
    """One transport over one group. ``rank`` and ``size`` are places in the group."""

    rank: int
    size: int
    traffic: Traffic

    def all_gather(self, x: Tensor, *, kind: str) -> Tensor:
        """[P, *x.shape] from x of one shape and dtype on every rank; small integers; blocks.
        Traffic counts by ``kind``."""
        ...

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        """Begin a transfer: peer -> contiguous buffer. Peers without rows are left out."""
        ...

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        """Send peer -> contiguous rows. Traffic counts by ``kind`` ("rows", "pairs", ...)."""
        ...

    def wait_recv(self, transfer: Transfer) -> None:
        """Block until the receive buffers are filled (on CUDA: until the stream may read them)."""
        ...

    def wait_send(self, transfer: Transfer) -> None:
        """Block until the sent rows may be overwritten."""
        ...


def make_exchange(group: dist.ProcessGroup | None, name: str = "auto") -> Exchange:
    """The transport ``name`` over ``group``; ``auto`` picks by size and backend of the group."""
    if name == "auto":
        name = _auto(group)
    exchange: Exchange = EXCHANGES.load(name)(group)
    return exchange


def _auto(group: dist.ProcessGroup | None) -> str:
    if group is None or dist.get_world_size(group) == 1:
        return "local"
    backend = dist.get_backend(group)
    return {"nccl": "all_to_all", "threaded": "threaded"}.get(backend, "p2p")
