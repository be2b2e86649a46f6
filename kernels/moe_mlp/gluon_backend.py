"""moe_mlp by warp-specialised kernels for Hopper: one warpgroup loads, two multiply.

The products are those of the Triton kernels, by programs that stay on their multiprocessor and walk
the tiles; tile list, row sums and the sum of dscore are the same kernels. See docs/design.md,
"Specialised warps": none of this has run on a GPU yet.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor

try:
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError(
        f"the moe_mlp backend 'gluon' needs triton 3.6 or newer, with Gluon ({error})"
    ) from error

from distmoe.kernels.moe_mlp import PairIndex, Runs
from distmoe.kernels.moe_mlp.gluon_dgrad import dgrad_kernel
from distmoe.kernels.moe_mlp.gluon_rows import rows_kernel
from distmoe.kernels.moe_mlp.gluon_tiles import config_for, constants
from distmoe.kernels.moe_mlp.gluon_up import up_kernel
from distmoe.kernels.moe_mlp.gluon_wgrad import wgrad_kernel
from distmoe.kernels.moe_mlp.tile_table import DEFAULTS, TileTable
from distmoe.kernels.moe_mlp.tiles import ExpertShape, TileConfig
from distmoe.kernels.moe_mlp.triton_backend import TritonMoeMlp, sum_dscore, tile_list
from distmoe.kernels.moe_mlp.triton_descriptors import TMA_ALIGNMENT, aligned, ragged_shape

DTYPES = {torch.bfloat16: bfloat16, torch.float16: float16}
# With peers one multiprocessor of so many has no program: 16 of an H100's 132. Programs stay until
# all tiles are done and leave no room beside them, so a collective that begins meanwhile needs
# others; every channel of NCCL is a block, which takes one. How many are best was not measured.
SPARED_ONE_IN = 8


class GluonMoeMlp:
    """Backend of the specialised kernels; compute capability 9.0 (H100, H200), ValueError for other
    devices. fp32, and widths that are no multiple of 16 bytes, run as the backend `triton` does."""

    def __init__(self, activation: str, tiles: TileTable = DEFAULTS) -> None:
        self.triton = TritonMoeMlp(activation)
        self.act, self.tiles = self.triton.act, tiles

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
        if not _is_for_tensor_cores(x_RH, a_LI):
            self.triton.forward(
                x_RH, w_in_eGH, w_out_eHI, index=index, runs=runs, z_LG=z_LG, a_LI=a_LI, y_LH=y_LH
            )
        elif runs.max_pairs:
            self.up(x_RH, w_in_eGH, index=index, runs=runs, z_LG=z_LG, a_LI=a_LI)
            config = self._config("down", w_out_eHI, runs.max_pairs)
            _rows_times_weight(config, a_LI, w_out_eHI, runs, y_LH, transposed=True)

    def up(
        self, x_RH: Tensor, w_in_eGH: Tensor, *, index: PairIndex, runs: Runs,
        z_LG: Tensor, a_LI: Tensor,
    ) -> None:  # fmt: skip
        """The first half of `forward`: z and a of the pairs in ``runs``."""
        H, I = x_RH.shape[1], a_LI.shape[1]
        shape = ExpertShape(H, I, len(w_in_eGH), self.act.gated, x_RH.dtype)
        config = config_for("up", shape, self.tiles.pick("up", shape, runs.max_pairs))
        tiles = tile_list(runs, config.m)
        up_kernel[_grid(x_RH, tiles.shape[1] * triton.cdiv(I, config.n))](
            x_RH, index.row_L, _weight(w_in_eGH, rows=config.n, cols=config.k),
            z_LG, a_LI, tiles, tiles.shape[1],
            H=H, I=I, GATED=self.act.gated, ACTIVATION=self.act.name, **_launch(config),
        )  # fmt: skip

    def row_sum(
        self,
        v_LH: Tensor,
        *,
        index: PairIndex,
        rows: slice,
        score_L: Tensor | None,
        out_RH: Tensor,
    ) -> None:
        self.triton.row_sum(v_LH, index=index, rows=rows, score_L=score_L, out_RH=out_RH)

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
        if not _is_for_tensor_cores(dy_RH, a_LI):
            self.triton.dgrad(
                dy_RH, score_L, z_LG, w_in_eGH, w_out_eHI, index=index, runs=runs,
                dz_LG=dz_LG, a_LI=a_LI, dx_LH=dx_LH, dscore_L=dscore_L,
            )  # fmt: skip
        elif runs.max_pairs:
            self.da(
                dy_RH, score_L, z_LG, w_out_eHI,
                index=index, runs=runs, dz_LG=dz_LG, a_LI=a_LI, dscore_L=dscore_L,
            )  # fmt: skip
            config = self._config("dx", w_out_eHI, runs.max_pairs)
            _rows_times_weight(config, dz_LG, w_in_eGH, runs, dx_LH, transposed=False)

    def da(
        self, dy_RH: Tensor, score_L: Tensor, z_LG: Tensor, w_out_eHI: Tensor,
        *, index: PairIndex, runs: Runs, dz_LG: Tensor, a_LI: Tensor, dscore_L: Tensor,
    ) -> None:  # fmt: skip
        """The first half of `dgrad`: dz, a_scaled and dscore of the pairs in ``runs``."""
        H, I, L = dy_RH.shape[1], a_LI.shape[1], a_LI.shape[0]
        config = self._config("dgrad", w_out_eHI, runs.max_pairs)
        tiles = tile_list(runs, config.m)
        num_tiles, num_blocks = tiles.shape[1], triton.cdiv(I, config.n)
        partial = torch.empty(num_blocks, L, dtype=torch.float32, device=dy_RH.device)
        dgrad_kernel[_grid(dy_RH, num_tiles * num_blocks)](
            dy_RH, index.row_L, _weight(w_out_eHI, rows=config.k, cols=config.n),
            score_L, z_LG, dz_LG, a_LI, partial, tiles, num_tiles, L,
            H=H, I=I, GATED=self.act.gated, ACTIVATION=self.act.name, **_launch(config),
        )  # fmt: skip
        sum_dscore(partial, dscore_L, tiles, config.m)

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        fits = _is_for_tensor_cores(x_RH, a_LI) and _is_for_tensor_cores(dy_RH, a_LI)
        if not fits or not len(index.row_L) or not len(x_RH):
            return self.triton.wgrad(x_RH, dy_RH, dz_LG, a_LI, index=index)
        e, H, G, I = index.num_experts, x_RH.shape[1], dz_LG.shape[1], a_LI.shape[1]
        dw_in_eGH, dw_out_eHI = x_RH.new_empty(e, G, H), x_RH.new_empty(e, H, I)
        config = self._config("wgrad_out", dw_out_eHI, len(index.row_L))
        _weight_gradient(config, dy_RH, a_LI, index, dw_out_eHI, gathered_first=True)
        config = self._config("wgrad_in", dw_out_eHI, len(index.row_L))
        _weight_gradient(config, x_RH, dz_LG, index, dw_in_eGH, gathered_first=False)
        return dw_in_eGH, dw_out_eHI

    def _config(self, kernel: str, w_out_eHI: Tensor, pairs: int) -> TileConfig:
        e, H, I = w_out_eHI.shape
        shape = ExpertShape(H, I, e, self.act.gated, w_out_eHI.dtype)
        return config_for(kernel, shape, self.tiles.pick(kernel, shape, pairs))


def _is_for_tensor_cores(v_RH: Tensor, a_LI: Tensor) -> bool:
    """16-bit types, and rows of whole 16 bytes, as TMA and cp.async move them."""
    aligned = v_RH.data_ptr() % TMA_ALIGNMENT == 0
    return aligned and v_RH.dtype in DTYPES and v_RH.shape[1] % 8 == 0 and a_LI.shape[1] % 8 == 0


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a Hopper GPU; ValueError for another device."""
    if device.type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(device)
        if (properties.major, properties.minor) == (9, 0):
            count: int = properties.multi_processor_count
            return count
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise ValueError(
        "the moe_mlp backend 'gluon' needs a GPU of compute capability 9.0 (H100, H200), "
        f"not {name}"
    )


def _grid(operand: Tensor, items: int) -> tuple[int]:
    """A program for every multiprocessor but the spared ones, or fewer if there is less to do."""
    count = multiprocessors(operand.device)
    spared = count // SPARED_ONE_IN if _has_peers() else 0
    return (min(items, count - spared),)


def _has_peers() -> bool:
    """Whether collectives may run beside a kernel: with P = 1, too, those of FSDP do."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _launch(config: TileConfig) -> dict[str, int]:
    return {
        "BM": config.m,
        "BN": config.n,
        **constants(config),
        "num_warps": config.num_warps,
    }


def _descriptor(v: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    layout = NVMMASharedLayout.get_default_for(block, DTYPES[v.dtype])
    return TensorDescriptor(v, shape, strides, block, layout)


def _weight(w_eXY: Tensor, *, rows: int, cols: int) -> Any:
    w_eXY = aligned(w_eXY)
    return _descriptor(w_eXY, list(w_eXY.shape), list(w_eXY.stride()), [1, rows, cols])


def _ragged(v_LN: Tensor, *, rows: int, cols: int) -> Any:
    return _descriptor(v_LN, *ragged_shape(v_LN), [1, 1, rows, cols])


def _rows_times_weight(
    config: TileConfig, v_LK: Tensor, w: Tensor, runs: Runs, out_LN: Tensor, *, transposed: bool
) -> None:
    K, N = v_LK.shape[1], out_LN.shape[1]
    tiles = tile_list(runs, config.m)
    rows, cols = (config.n, config.k) if transposed else (config.k, config.n)
    rows_kernel[_grid(v_LK, tiles.shape[1] * triton.cdiv(N, config.n))](
        _ragged(v_LK, rows=config.m, cols=config.k),
        _weight(w, rows=rows, cols=cols),
        out_LN, tiles, tiles.shape[1],
        K=K, N=N, TRANSPOSED=transposed, **_launch(config),
    )  # fmt: skip


def _weight_gradient(
    config: TileConfig, gathered_RH: Tensor, v_LW: Tensor, index: PairIndex, dw: Tensor,
    *, gathered_first: bool,
) -> None:  # fmt: skip
    H, W = gathered_RH.shape[1], v_LW.shape[1]
    m, n = (H, W) if gathered_first else (W, H)
    bh, bw = (config.m, config.n) if gathered_first else (config.n, config.m)
    blocks = triton.cdiv(m, config.m) * triton.cdiv(n, config.n)
    wgrad_kernel[_grid(gathered_RH, index.num_experts * blocks)](
        gathered_RH, index.row_L, _ragged(v_LW, rows=config.k, cols=bw),
        index.offsets_e1, dw, index.num_experts,
        H=H, W=W, GATHERED_FIRST=gathered_first, BH=bh, BW=bw,
        **constants(config), num_warps=config.num_warps,
    )  # fmt: skip
