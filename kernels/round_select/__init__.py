"""The local part of token rounding: which pairs of an expert are dropped or added first.

Priorities are integers, larger is better, [E, T] so that the column of an expert is contiguous. An
expert that adds ranks the pairs that top-k did not choose by their key; one that drops ranks the
chosen ones by their key, lowest first. Among equals an add takes the lowest token first, a drop
the highest. Only the best few of a column matter, so nothing is ever sorted whole.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from distmoe.kernels.backends import fused_or_torch
from distmoe.registry import ROUND_SELECT_BACKENDS

# Priority of a pair that its expert cannot change. Keys are within 2^26 of 0.
NOTHING = -(1 << 30)
KEY_LIMIT = 1 << 26


class RoundSelect(Protocol):
    """One backend. ``key_TE`` int32, ``chosen_TE`` bool, ``adds_E`` bool."""

    def priorities(self, key_TE: Tensor, chosen_TE: Tensor, adds_E: Tensor) -> Tensor:
        """[E, T] int32: key where an expert adds, -key where it drops, NOTHING for the pairs that
        are not eligible."""
        ...

    def best(self, priority_ET: Tensor, num: int) -> Tensor:
        """[E, num] int32: the best priorities of each expert, descending, then NOTHING."""
        ...

    def take(
        self,
        chosen_TE: Tensor,
        priority_ET: Tensor,
        amount_E: Tensor,
        adds_E: Tensor,
        *,
        most: int,
    ) -> Tensor:
        """[T, E] bool: ``chosen_TE`` with the ``amount_E`` best eligible pairs of each expert
        turned over. ``most``: a bound on the amounts that the host knows."""
        ...

    def merge(self, best_PEC: Tensor, adds_E: Tensor, amount_E: Tensor) -> Tensor:
        """[P, E] int64: how many of each rank's candidates, what `best` gave it, are among the best
        ``amount_E`` (at most C) of all ranks. Equal keys: lower ranks win an add, higher ranks lose
        a drop first."""
        ...


def load_round_select(key_TE: Tensor, backend: str = "auto") -> RoundSelect:
    """The backend for the device of ``key_TE``."""
    name = fused_or_torch(key_TE.device) if backend == "auto" else backend
    round_select: RoundSelect = ROUND_SELECT_BACKENDS.load(name)()
    return round_select
