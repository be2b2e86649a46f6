"""What one forward of one MoE layer did: integers on the device, never waited for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distmoe.kernels.router_topk.torch_backend import integer_keys
from distmoe.moe.plan import DispatchPlan
from distmoe.routing.round_tokens import Rounded
from distmoe.routing.routers import Scores

# The counts of `MoEStats.own`, in its order.
DEVICE_COUNTS = (
    "dropped",
    "added",
    "without_expert",
    "chosen_mass",
    "dropped_mass",
    "added_mass",
)
# With those that the host has.
OWN_COUNTS = (*DEVICE_COUNTS, "rows_sent", "copies_sent")


@dataclass(frozen=True)
class MoEStats:
    """Counts of one layer and micro-batch.

    ``freq_E``: top-k pairs per expert over the ep group; ``target_E``: pairs after rounding, over
    the ep group (both int64). This rank's own (0-d int64): ``dropped``, ``added`` pairs and
    ``without_expert`` tokens; ``chosen_mass``, ``dropped_mass``, ``added_mass``: scores of the
    pairs of top-k, of the dropped and of the added ones, as exact sums of floor(score * 2^24).
    ``rows_sent`` rows left the rank in one direction, ``copies_sent`` would have with one copy per
    pair.
    """

    freq_E: Tensor
    target_E: Tensor
    dropped: Tensor
    added: Tensor
    without_expert: Tensor
    chosen_mass: Tensor
    dropped_mass: Tensor
    added_mass: Tensor
    rows_sent: int = 0
    copies_sent: int = 0

    @staticmethod
    @torch.no_grad()
    def count(scores: Scores, rounded: Rounded) -> MoEStats:
        """From the router's choice, and what rounding made of it; no row is sent yet."""
        dropped_TE = scores.chosen_TE > rounded.selected_TE
        added_TE = rounded.selected_TE > scores.chosen_TE
        # Not key_TE, in which a balance bias may be.
        mass_TE = integer_keys(scores.score_TE)
        return MoEStats(
            freq_E=rounded.freq_E,
            target_E=rounded.target_E,
            dropped=dropped_TE.sum(),
            added=added_TE.sum(),
            without_expert=(~rounded.selected_TE.any(1)).sum(),
            chosen_mass=_sum_where(scores.chosen_TE, mass_TE),
            dropped_mass=_sum_where(dropped_TE, mass_TE),
            added_mass=_sum_where(added_TE, mass_TE),
        )

    def with_rows_of(self, plan: DispatchPlan) -> MoEStats:
        """The same, and the rows that ``plan`` sends."""
        return replace(self, rows_sent=plan.rows_sent(), copies_sent=plan.copies_sent())

    def own(self) -> Tensor:
        """[len(DEVICE_COUNTS)] int64: this rank's counts that are on the device."""
        return torch.stack([getattr(self, name) for name in DEVICE_COUNTS]).long()


def _sum_where(mask_TE: Tensor, mass_TE: Tensor) -> Tensor:
    """0-d int64: int32 sums would overflow at 128 scores of 1."""
    return (mask_TE * mass_TE).sum(dtype=torch.int64)
