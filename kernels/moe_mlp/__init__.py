"""The expert MLP over gathered rows, in the pieces that an overlapped layer runs as rows arrive.

For expert i and each of its pairs l, with row r = row_L[l] and weight s = score_L[l]:

    z = x_RH[r] W_in[i]^T      [G]; gated activations have gate, then up, G = 2I; others G = I
    a = act(z)                 [I]; gated: act(gate) * up
    y = a W_out[i]^T           [H]
    y_RH[r] = sum of s * y over the pairs of row r, in fp32, experts in ascending order

Backward from dy_RH (SonicMoE, arXiv 2512.14080, algorithm 3), with da' = dy_RH[r] W_out[i]:

    dscore = <da', a>          needs no y: the rank that sent the row never sees y either
    dz = dact(s * da', z);     a_scaled = s * a
    dx = dz W_in[i];           dx_RH[r] = sum over the pairs of row r
    dW_out[i] = dy_RH[r]^T a_scaled;  dW_in[i] = dz^T x_RH[r], summed over the pairs of expert i

Kept for the backward: x_RH, z_LG, scores and indices: 2RH + 2LG bytes in 16-bit types. a, y and
gathered rows are transient. Every backend implements `MoeMlp`; `reference` is the specification.

How many pairs an expert has is known on the device only: nothing here needs it on the host. Arrays
over pairs may be longer than the pairs there are; what lies behind the last pair is never read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from distmoe.kernels.backends import fused_kernels_run_on
from distmoe.kernels.moe_mlp.tile_table import DEFAULTS, TileTable
from distmoe.registry import MOE_MLP_BACKENDS, MOE_MLP_TILES


@dataclass(frozen=True)
class PairIndex:
    """The (row, expert) pairs that a rank computes, sorted by expert. All int32.

    ``row_L``; ``offsets_e1``: expert i owns pairs offsets[i] to offsets[i + 1], and offsets[e] is
    the number of pairs, at most L. ``by_row_L`` lists the pairs sorted by (row, expert), which
    fixes the order of sums; row r owns by_row_L[row_offsets[r]:row_offsets[r + 1]].
    """

    row_L: Tensor
    offsets_e1: Tensor
    by_row_L: Tensor
    row_offsets_R1: Tensor

    @property
    def num_rows(self) -> int:
        return self.row_offsets_R1.numel() - 1

    @property
    def num_experts(self) -> int:
        return self.offsets_e1.numel() - 1

    @cached_property
    def offsets_host(self) -> list[int]:
        """``offsets_e1`` for backends that loop on the host; waits for the device."""
        offsets: list[int] = self.offsets_e1.tolist()
        return offsets

    @cached_property
    def row_offsets_host(self) -> Tensor:
        """``row_offsets_R1`` on the host, likewise."""
        return self.row_offsets_R1.cpu()


@dataclass(frozen=True)
class Run:
    """Consecutive pairs ``begin`` to ``end`` of a local expert: whole tiles or a ragged rest."""

    expert: int
    begin: int
    end: int


@dataclass(frozen=True)
class Runs:
    """The pairs that one call computes: a range of consecutive pairs of every expert.

    ``bounds_2e`` int32: first pair, and pair after the last, of each expert; equal for an expert
    that has nothing to do. ``max_pairs``: a bound on their number, known on the host, from which
    grids are launched. ``derived``: what a backend makes of the ranges and keeps for the next call.
    ``blocks``: those that it is one of, with its ``number``, if a backend may make something of all
    of them at once.
    """

    bounds_2e: Tensor
    max_pairs: int
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    blocks: RunsOfBlocks | None = None
    number: int = 0

    @staticmethod
    def of_all(index: PairIndex) -> Runs:
        """Every pair of ``index``."""
        bounds_2e = torch.stack([index.offsets_e1[:-1], index.offsets_e1[1:]])
        return Runs(bounds_2e, max_pairs=index.row_L.numel())

    @cached_property
    def on_host(self) -> list[Run]:
        """The ranges that are not empty, for backends with host loops; waits for the device."""
        begins, ends = self.bounds_2e.tolist()
        bounds = zip(begins, ends, strict=True)
        return [Run(i, begin, end) for i, (begin, end) in enumerate(bounds) if end > begin]


@dataclass(frozen=True)
class RunsOfBlocks:
    """The pairs of calls that follow each other. ``bounds_b2e`` int32, contiguous: see `Runs`;
    ``pairs_b``: exactly as many pairs. ``derived``: as in `Runs`, of all blocks."""

    bounds_b2e: Tensor
    pairs_b: list[int]
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def each(self) -> list[Runs]:
        """The pairs of every call."""
        return [
            Runs(bounds_2e, max_pairs=pairs, blocks=self, number=i)
            for i, (bounds_2e, pairs) in enumerate(zip(self.bounds_b2e, self.pairs_b, strict=True))
        ]


class MoeMlp(Protocol):
    """One backend, made for one activation. Outputs are written into the given buffers, at the
    given pairs or rows only."""

    def forward(
        self,
        x_RH: Tensor,
        w_in_eGH: Tensor,
        w_out_eHI: Tensor,
        *,
        index: PairIndex,
        runs: Runs,
        z_LG: Tensor,
        a_LI: Tensor,
        y_LH: Tensor,
    ) -> None:
        """Up-projection, activation and down-projection of the pairs in ``runs``. ``a_LI`` is
        scratch."""
        ...

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        """out_RH[r] = sum of (score *) v over the pairs of r, fp32, for r in ``rows``."""
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
        runs: Runs,
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


def check_operands(x_RH: Tensor, w_in_eGH: Tensor, w_out_eHI: Tensor) -> None:
    """ValueError if no backend can compute with them: other dtypes, or widths that do not fit."""
    if not x_RH.dtype == w_in_eGH.dtype == w_out_eHI.dtype:
        raise ValueError(
            f"rows are {x_RH.dtype}, w_in {w_in_eGH.dtype} and w_out {w_out_eHI.dtype}; rows and "
            "expert weights must have one dtype, or torch.autocast must be on"
        )
    experts, hidden = len(w_in_eGH), x_RH.shape[1]
    if w_in_eGH.shape[2] != hidden or w_out_eHI.shape[:2] != (experts, hidden):
        raise ValueError(
            f"rows are {hidden} wide, w_in is {tuple(w_in_eGH.shape)} and w_out "
            f"{tuple(w_out_eHI.shape)}; they must be [e, G, H] and [e, H, I] with H = {hidden}"
        )


def backend_for(name: str, device: torch.device) -> str:
    """The name of a backend; ``auto`` is the fused kernels where they run, matrix products else."""
    if name != "auto":
        return name
    return "triton" if fused_kernels_run_on(device) else "torch"


def load_backend(name: str, activation: str = "swiglu", *, tiles: TileTable = DEFAULTS) -> MoeMlp:
    """The backend called ``name`` for ``activation``, a name in `activations.ACTIVATIONS`.

    ``tiles``: what its kernels take instead of their default tile configurations, see
    `find_tiles`; for backends in `registry.MOE_MLP_TILES`, which others know nothing of.
    """
    make = MOE_MLP_BACKENDS.load(name)
    backend: MoeMlp = make(activation, tiles) if name in MOE_MLP_TILES else make(activation)
    return backend
