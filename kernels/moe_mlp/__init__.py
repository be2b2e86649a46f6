"""The expert MLP over gathered rows, in the pieces that an overlapped layer runs as rows arrive.

For expert i and each of its pairs l, with row r = row_L[l] and weight s = score_L[l]:

    z = x_RH[r] W_in[i]^T      [G], gate then up, G = 2I
    a = silu(z[:I]) * z[I:]    [I]
    y = a W_out[i]^T           [H]
    y_RH[r] = sum of s * y over the pairs of row r, in fp32, experts in ascending order

Backward from dy_RH (SonicMoE, arXiv 2512.14080, algorithm 3), with da' = dy_RH[r] W_out[i]:

    dscore = <da', a>          needs no y: the rank that sent the row never sees y either
    dz = dswiglu(s * da', z);  a_scaled = s * a
    dx = dz W_in[i];           dx_RH[r] = sum over the pairs of row r
    dW_out[i] = dy_RH[r]^T a_scaled;  dW_in[i] = dz^T x_RH[r], summed over the pairs of expert i

Kept for the backward: x_RH, z_LG, scores and indices: 2RH + 4LI bytes in 16-bit types. a, y and
gathered rows are transient. Every backend implements `MoeMlp`; `reference` is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from distmoe.registry import MOE_MLP_BACKENDS


@dataclass(frozen=True)
class PairIndex:
    """The (row, expert) pairs that a rank computes, sorted by expert.

    ``row_L`` int32; ``offsets_e1`` int32, expert i owns pairs offsets[i] to offsets[i+1], the same
    numbers on the host in ``offsets_host``;
    ``by_row_L`` int32 lists the pairs sorted by (row, expert), which fixes the order of sums;
    ``row_offsets_R1`` int32, row r owns by_row_L[row_offsets[r]:row_offsets[r+1]].
    """

    row_L: Tensor
    offsets_e1: Tensor
    offsets_host: tuple[int, ...]
    by_row_L: Tensor
    row_offsets_R1: Tensor

    @property
    def num_rows(self) -> int:
        return self.row_offsets_R1.numel() - 1


@dataclass(frozen=True)
class Run:
    """Consecutive pairs ``begin`` to ``end`` of a local expert: whole tiles or a ragged rest."""

    expert: int
    begin: int
    end: int


@dataclass(frozen=True)
class RowBlock:
    """Consecutive rows of x_RH and the stretch of ``by_row_L`` that holds their pairs."""

    row_begin: int
    row_end: int
    pair_begin: int
    pair_end: int


class MoeMlp(Protocol):
    """One backend. Outputs are written into the given buffers, at the given pairs or rows only."""

    def forward(
        self,
        x_RH: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        *,
        index: PairIndex,
        runs: list[Run],
        z_LG: Tensor,
        y_LH: Tensor,
    ) -> None:
        """Up-projection, activation and down-projection of the pairs in ``runs``."""
        ...

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        block: RowBlock,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        """out_RH[r] = sum of (score *) v over the pairs of r, fp32, for the rows of ``block``."""
        ...

    def dgrad(
        self,
        dy_RH: Tensor,
        score_L: Tensor,
        z_LG: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        *,
        index: PairIndex,
        runs: list[Run],
        dz_LG: Tensor,
        a_LI: Tensor,
        dx_LH: Tensor,
        dscore_L: Tensor,
    ) -> None:
        """Gradients of the pairs in ``runs`` that need no other pair; a_LI receives score * a."""
        ...

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        """dW_in [e,G,H] and dW_out [e,H,I]; zero for an expert without pairs."""
        ...


def load_backend(name: str) -> MoeMlp:
    """The backend called ``name``; ``auto`` is the fastest one for the machine."""
    backend: MoeMlp = MOE_MLP_BACKENDS.load("torch" if name == "auto" else name)()
    return backend
