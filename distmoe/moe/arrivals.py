"""The pairs that arrive at a rank, brought into the order in which its experts compute them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distmoe.kernels.arrange_pairs import Messages, arrange_pairs
from distmoe.kernels.moe_mlp import PairIndex
from distmoe.moe.host_copy import HostCopy, ints, to_device
from distmoe.moe.int_array import IntArray
from distmoe.moe.schedule import Part


@dataclass(frozen=True)
class Arrived:
    """Pairs in (expert, arrival) order. ``place_L`` int64: where each pair of the messages lies.
    ``rows_A_host``: rows of every arrival; ``counts_Ae_host``: its pairs by expert;
    ``relayed_PC_host``: rows to pass on by source and run."""

    index: PairIndex
    score_L: Tensor
    place_L: Tensor
    rows_A_host: IntArray
    counts_Ae_host: IntArray
    relayed_PC_host: IntArray


class Arrangement:
    """Rows lie in the order of ``arrivals``, an expert's pairs too. How many rows there are comes
    to the host while other work goes on, until `finish`."""

    def __init__(self, messages: Messages, arrivals: list[Part]) -> None:
        place_A = np.array([part.rank * messages.width + part.run for part in arrivals])
        device = messages.message_X2.device
        self._pairs = arrange_pairs(messages, to_device(place_A.astype(np.int32), device))
        self._sizes = HostCopy(self._pairs.rows_A, self._pairs.counts_Ae, self._pairs.relayed_PC)
        # Behind the sizes, which the host waits for.
        self._by_row = ByRow(self._pairs.row_L)

    def finish(self) -> Arrived:
        """Waits for the sizes."""
        rows_A_host, counts_Ae_host, relayed_PC_host = self._sizes.wait()
        row_offsets_R1 = self._by_row.offsets(num_rows=sum(ints(rows_A_host)))
        pairs = self._pairs
        return Arrived(
            index=PairIndex(pairs.row_L, pairs.offsets_e1, self._by_row.by_row_L, row_offsets_R1),
            score_L=pairs.score_L,
            place_L=pairs.place_L,
            rows_A_host=rows_A_host,
            counts_Ae_host=counts_Ae_host,
            relayed_PC_host=relayed_PC_host,
        )


class ByRow:
    """`PairIndex.by_row_L` and ``row_offsets_R1``, int32, of pairs with the rows ``row_L`` (int32,
    as a radix sort takes a pass for every few bits of its keys)."""

    def __init__(self, row_L: Tensor) -> None:
        self._sorted_L, by_row_L = row_L.sort(stable=True)
        self.by_row_L = by_row_L.int()

    def offsets(self, *, num_rows: int) -> Tensor:
        """``row_offsets_R1``."""
        row_R1 = torch.arange(num_rows + 1, dtype=torch.int32, device=self.by_row_L.device)
        return torch.searchsorted(self._sorted_L, row_R1, out_int32=True)
