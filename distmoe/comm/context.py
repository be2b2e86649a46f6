"""Context parallelism: the ranks of the cp axis share the same sequences.

A sequence is cut into 2 C chunks, of which rank r has chunks r and 2 C - 1 - r: so all ranks have
the same work under a causal mask (Llama 3, arXiv 2407.21783, section 3.3.2). Queries stay on their
rank. Keys and values, or what they are made from, are gathered, and their gradients are summed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmoe.comm import exchange_now, make_exchange


@dataclass(frozen=True)
class ContextPart:
    """What the rank in place ``rank`` of the ``size`` ranks of a cp axis has of a sequence."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def of_rank(rank: int, cp: int) -> ContextPart:
        """``rank``: in the run. The cp axis is innermost."""
        return ContextPart(rank % cp, cp)

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of its two chunks, of 2 * size."""
        return self.rank, 2 * self.size - 1 - self.rank

    def positions(self, num_own: int, device: torch.device | None = None) -> Tensor:
        """Of its ``num_own`` tokens of a sequence, rising, int64 [num_own]."""
        if self.size == 1:
            return torch.arange(num_own, device=device)
        chunk = num_own // 2
        within = torch.arange(chunk, device=device)
        return torch.cat([within + number * chunk for number in self.chunks])


WHOLE = ContextPart()


class SequenceGather:
    """Tensors of whole sequences from those of the ranks of ``group``, with gradients; collective.
    None: this rank has whole sequences. ``layer``: in traces and warnings."""

    def __init__(
        self, group: dist.ProcessGroup | None, *, ranks_per_node: int = 0, layer: str = "attention"
    ) -> None:
        self.exchange = make_exchange(group, ranks_per_node=ranks_per_node)
        self.exchange.observer.layer = layer
        self.part = ContextPart(self.exchange.rank, self.exchange.size)

    def __call__(self, *own: Tensor) -> tuple[Tensor, ...]:
        """[..., S / C, X] of any X -> [..., S, X], positions in order; in one message."""
        if self.part.size == 1:
            return own
        whole: Tensor = _Gather.apply(torch.cat(own, dim=-1), self)  # type: ignore[no-untyped-call]
        return torch.split(whole, [x.shape[-1] for x in own], dim=-1)

    def gather(self, own: Tensor) -> Tensor:
        """[..., S / C, X] -> [..., S, X]."""
        low, high = self.exchange.all_gather(own, kind="keys and values").chunk(2, dim=-2)
        return torch.cat([*low, *high.flip(0)], dim=-2)

    def sum_gradients(self, dy: Tensor) -> Tensor:
        """[..., S, X] of every rank -> their sum [..., S / C, X] at this rank's positions.

        Addends travel in their own dtype, as in a reduce-scatter, and are summed in fp32 in the
        order of the ranks, so that they are rounded once and the same in every run.
        """
        size, own = self.part.size, self.part.rank
        chunks = dy.chunk(2 * size, dim=-2)
        parts = [
            torch.cat([chunks[number] for number in ContextPart(rank, size).chunks], dim=-2)
            for rank in range(size)
        ]
        peers = [rank for rank in range(size) if rank != own]
        received = {peer: torch.empty_like(parts[own]) for peer in peers}
        sent = {peer: parts[peer] for peer in peers}
        exchange_now(self.exchange, "gradients of keys and values", received, sent)
        addends = received | {own: parts[own]}
        summed = torch.zeros_like(parts[own], dtype=torch.float32)
        for rank in range(size):
            summed += addends[rank]
        return summed.to(dy.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, gather: SequenceGather) -> Tensor:
        ctx.gather = gather
        return gather.gather(own)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.gather.sum_gradients(grads[0]), None
