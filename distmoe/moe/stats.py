"""What one forward of one MoE layer did: integers on the device, never waited for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MoEStats:
    """Counts of one layer and micro-batch.

    ``freq_E``: top-k pairs per expert over the ep group; ``target_E``: pairs after rounding, over
    the ep group (both int64). This rank's own: ``dropped``, ``added`` pairs and
    ``without_expert`` tokens (0-d int64), ``rows_sent`` rows that left the rank in one direction,
    ``copies_sent`` rows that would have left it with one copy per pair.
    """

    freq_E: Tensor
    target_E: Tensor
    dropped: Tensor
    added: Tensor
    without_expert: Tensor
    rows_sent: int
    copies_sent: int

    def own(self) -> Tensor:
        """[5] int64: dropped, added, without_expert, rows_sent, copies_sent of this rank."""
        counted = torch.stack([self.dropped, self.added, self.without_expert]).long()
        sent = torch.tensor([self.rows_sent, self.copies_sent], device=counted.device)
        return torch.cat([counted, sent])
