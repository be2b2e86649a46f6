"""Ranks as threads over a transport that forgives nothing which a network would not forgive."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from distmoe.comm import Transfer
from distmoe.comm.threaded import ThreadedExchange, _arrived, _mail


class HostileExchange(ThreadedExchange):
    """Rows are read as late as the contract allows: when the receiver waits for them, or else when
    the sender waits until it may write to them. Buffers must be contiguous. ``open``: what was
    posted and never waited for, as (kind, tag, side)."""

    open: set[tuple[str, int, str]]

    def post_recv(self, kind: str, recv: Mapping[int, Tensor]) -> Transfer:
        assert all(buffer.is_contiguous() for buffer in recv.values()), kind
        transfer = super().post_recv(kind, recv)
        self.open = getattr(self, "open", set())
        self.open |= {(kind, transfer.tag, side) for side in ("receive", "send")}
        return transfer

    def post_send(self, transfer: Transfer, send: Mapping[int, Tensor]) -> None:
        assert all(rows.is_contiguous() for rows in send.values()), transfer.kind
        super().post_send(transfer, send)

    def _send(self, transfer: Transfer) -> None:
        with _arrived:
            for peer, rows in transfer.send.items():
                _mail[self._address(self.rank, peer, transfer.tag)] = rows
            _arrived.notify_all()

    def _take(self, peer: int, buffer: Tensor, tag: int) -> None:
        # Copied under the lock, so that the sender does not write meanwhile.
        with _arrived:
            super()._take(peer, buffer, tag)

    def wait_recv(self, transfer: Transfer) -> None:
        super().wait_recv(transfer)
        self.open.discard((transfer.kind, transfer.tag, "receive"))

    def wait_send(self, transfer: Transfer) -> None:
        with _arrived:
            for peer in transfer.send:
                address = self._address(self.rank, peer, transfer.tag)
                if address in _mail:
                    _mail[address] = _mail[address].clone()
        super().wait_send(transfer)
        self.open.discard((transfer.kind, transfer.tag, "send"))
