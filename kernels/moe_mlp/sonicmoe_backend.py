"""moe_mlp by the kernels of the official SonicMoE package (sonic-moe on PyPI, Hopper and newer).

Only what the package exposes in `sonicmoe.functional` is called. Its kernels interleave gate and up
in the columns of z and dz; the weights keep the concatenated layout, which the kernels are told. z
and dz therefore mean something to this backend only.

Its GEMMs run over all pairs of every expert, front to back, so a layer that overlaps the exchange
in several steps cannot use it. It tunes itself whenever a size changes, the number of pairs among
them: give it arrays over pairs of one length, or ``tuned=False``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, Runs

try:
    from sonicmoe.functional import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        gemm,
        gemm_dgated,
        gemm_gated,
    )
    from sonicmoe.functional.reduction_over_k_gather import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        token_gather_and_sum_varlen_K_triton,
    )
except ImportError as error:
    raise ImportError(
        f"the moe_mlp backend 'sonicmoe' needs the package sonic-moe: "
        f"pip install 'distmoe[sonicmoe]' ({error})"
    ) from error

# Its geglu is the tanh approximation, which is another function than ours; ungated activations
# are not supported by its kernels.
ACTIVATIONS = ("swiglu", "reglu")
CONCATENATED = ("B",)


class SonicMoeMlp:
    """Backend of the package's kernels: bf16 or fp16 on compute capability 9.0 or newer, H and I
    multiples of 8. ValueError for what it cannot compute."""

    def __init__(self, activation: str, *, tuned: bool = True) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {activation!r} is not supported by the moe_mlp backend 'sonicmoe'; "
                f"it has {', '.join(ACTIVATIONS)}"
            )
        self.activation, self.tuned = activation, tuned

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
        _check(x_RH, index, runs)
        if not runs.max_pairs:
            return
        self.up(x_RH, w_in_eGH, index=index, runs=runs, z_LG=z_LG, a_LI=a_LI)
        gemm(
            a_LI,
            w_out_eHI.mT,
            out=y_LH,
            cu_seqlens_m=index.offsets_e1,
            tuned=self.tuned,
        )

    def up(
        self, x_RH: Tensor, w_in_eGH: Tensor, *, index: PairIndex, runs: Runs,
        z_LG: Tensor, a_LI: Tensor,
    ) -> None:  # fmt: skip
        """The first half of `forward`: z and a of all pairs."""
        gemm_gated(
            x_RH,
            w_in_eGH.mT,
            activation=self.activation,
            preact_out=z_LG,
            postact_out=a_LI,
            cu_seqlens_m=index.offsets_e1,
            A_idx=index.row_L,
            tuned=self.tuned,
            concat_layout=CONCATENATED,
        )

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        num_rows, (L, H) = rows.stop - rows.start, v_LH.shape
        if not num_rows or not L:
            out_RH[rows] = 0
            return
        weight_L = None
        if score_L is not None:
            # It reads weights in the order of the sums. Places behind the last pair hold anything.
            weight_L = score_L.float().index_select(0, index.by_row_L.clamp(0, L - 1))
        token_gather_and_sum_varlen_K_triton(
            v_LH,
            weight_L,
            out_RH[rows],
            index.by_row_L,
            index.row_offsets_R1[rows.start : rows.stop + 1],
            T=num_rows,
            MAX_K=index.num_experts,
            H=H,
            is_varlen_K=True,
        )

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
        _check(dy_RH, index, runs)
        if not runs.max_pairs:
            return
        self.da(
            dy_RH, score_L, z_LG, w_out_eHI,
            index=index, runs=runs, dz_LG=dz_LG, a_LI=a_LI, dscore_L=dscore_L,
        )  # fmt: skip
        gemm(
            dz_LG,
            w_in_eGH,
            out=dx_LH,
            cu_seqlens_m=index.offsets_e1,
            tuned=self.tuned,
            concat_layout=CONCATENATED,
        )

    def da(
        self, dy_RH: Tensor, score_L: Tensor, z_LG: Tensor, w_out_eHI: Tensor,
        *, index: PairIndex, runs: Runs, dz_LG: Tensor, a_LI: Tensor, dscore_L: Tensor,
    ) -> None:  # fmt: skip
        """The first half of `dgrad`: dz, a_scaled and dscore of all pairs."""
        _, _, dscore = gemm_dgated(
            dy_RH,
            w_out_eHI,
            PreAct=z_LG,
            activation=self.activation,
            dx_out=dz_LG,
            postact_out=a_LI,
            colvec_scale=score_L.float(),
            colvec_reduce=True,
            cu_seqlens_m=index.offsets_e1,
            A_idx=index.row_L,
            dynamic_scheduler=False,
            tuned=self.tuned,
        )
        dscore_L.copy_(dscore)

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        e, H, G, I = index.num_experts, x_RH.shape[1], dz_LG.shape[1], a_LI.shape[1]
        if not index.row_L.numel() or not x_RH.numel():
            return x_RH.new_zeros(e, G, H), x_RH.new_zeros(e, H, I)
        dw_in_eGH, dw_out_eHI = x_RH.new_empty(e, G, H), x_RH.new_empty(e, H, I)
        gemm(
            dy_RH.T,
            a_LI,
            out=dw_out_eHI,
            cu_seqlens_k=index.offsets_e1,
            A_idx=index.row_L,
            tuned=self.tuned,
        )
        gemm(
            x_RH.T,
            dz_LG,
            out=dw_in_eGH.mT,
            cu_seqlens_k=index.offsets_e1,
            A_idx=index.row_L,
            tuned=self.tuned,
            concat_layout=("out",),
        )
        return dw_in_eGH, dw_out_eHI


def _check(x_RH: Tensor, index: PairIndex, runs: Runs) -> None:
    """ValueError for what the package cannot compute; no wait for the device."""
    if x_RH.element_size() != 2:
        raise ValueError(f"the moe_mlp backend 'sonicmoe' needs bf16 or fp16, not {x_RH.dtype}")
    L, H = index.row_L.numel(), x_RH.shape[1]
    if L * H >= 2**32:
        # Its row sums count elements in 32 bits.
        raise ValueError(
            f"the moe_mlp backend 'sonicmoe' takes less than 2^32 elements, not {L} pairs x {H}"
        )
    refusal = (
        "the moe_mlp backend 'sonicmoe' computes all pairs at once: overlap with several steps is "
        "not supported by it"
    )
    if runs.max_pairs < L:
        raise ValueError(refusal)
    if "sonicmoe" not in runs.derived:
        # A bound does not tell: asked on the device, once per ranges.
        offsets = index.offsets_e1
        whole = (runs.bounds_2e == torch.stack([offsets[:-1], offsets[1:]])).all()
        torch._assert_async(whole, refusal)  # type: ignore[call-overload,unused-ignore]
        runs.derived["sonicmoe"] = True
