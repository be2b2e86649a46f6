"""The pairs that arrive at a rank, from the messages of all sources into (expert, arrival) order.

A source's rows for this rank are cut into runs, which arrive one by one. Nothing is sorted: the
pairs of a source, expert and run lie together in its message, as rows rise with the token there, so
that these segments move as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distmoe.kernels.backends import fused_or_torch
from distmoe.registry import ARRANGE_PAIRS_BACKENDS

# Runs of the rows of this rank's own tokens, whatever those of others.
HALVES = 2


@dataclass(frozen=True)
class Messages:
    """What all sources have for this rank, on the device.

    ``message_X2`` int32, source by source: a head with the rows of each of its C ``runs`` (beside
    it the rows of the run that this rank shall pass on), then row and bits of the fp32 score of
    every pair, sorted by (expert, token). The head of a source that has nothing for this rank is
    zero. ``from_Pe`` integers: pairs by source and local expert; ``pairs_P``: their sums over the
    experts, on the host. ``rank``: this one, whose rows are two halves instead.
    """

    message_X2: Tensor
    from_Pe: Tensor
    pairs_P: list[int]
    rank: int
    runs: int

    @property
    def width(self) -> int:
        """Runs that a source may have."""
        return max(self.runs, HALVES)

    @property
    def num_pairs(self) -> int:
        """L."""
        return sum(self.pairs_P)


@dataclass(frozen=True)
class ArrangedPairs:
    """``row_L`` int32: row among all that arrive, ``score_L`` fp32, both by (expert, arrival);
    ``offsets_e1`` int32: of every expert; ``place_L`` int64: where each pair of the messages lies.
    All int64: ``rows_A`` rows of every arrival, ``counts_Ae`` its pairs by expert, ``relayed_PC``
    rows to pass on by source and run."""

    row_L: Tensor
    score_L: Tensor
    offsets_e1: Tensor
    place_L: Tensor
    rows_A: Tensor
    counts_Ae: Tensor
    relayed_PC: Tensor


class ArrangePairs(Protocol):
    """One backend. ``place_A`` int32: source * width + run of every arrival, in order; all runs
    that have rows are there."""

    def __call__(self, messages: Messages, place_A: Tensor) -> ArrangedPairs: ...


def arrange_pairs(messages: Messages, place_A: Tensor, *, backend: str = "auto") -> ArrangedPairs:
    """See `ArrangePairs`. Nothing waits for the device."""
    device = messages.message_X2.device
    name = fused_or_torch(device) if backend == "auto" else backend
    arrange: ArrangePairs = ARRANGE_PAIRS_BACKENDS.load(name)
    return arrange(messages, place_A)
