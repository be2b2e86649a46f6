"""moe_mlp by fused Triton kernels: the default on a GPU.

Gathers happen on load, the activation and its derivative in epilogues, and only z outlives the
forward. Every launch is from bounds that the host knows, so nothing waits for the device.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
from torch import Tensor

from distmoe.kernels.moe_mlp import PairIndex, Runs
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.kernels.moe_mlp.tile_table import DEFAULTS, TileTable, bucket_of
from distmoe.kernels.moe_mlp.tiles import (
    ExpertShape,
    TileConfig,
    columns_of,
    config_for,
    has_overrides,
)
from distmoe.kernels.moe_mlp.triton_descriptors import ragged, stacked_weight, weight
from distmoe.kernels.moe_mlp.triton_dgrad import dgrad_kernel, dscore_kernel
from distmoe.kernels.moe_mlp.triton_row_sum import row_sum_kernel
from distmoe.kernels.moe_mlp.triton_rows import rows_kernel
from distmoe.kernels.moe_mlp.triton_tile_list import tile_list_kernel
from distmoe.kernels.moe_mlp.triton_up import up_kernel
from distmoe.kernels.moe_mlp.triton_wgrad import wgrad_kernel

# Slots times experts that one program of the tile list compares.
TILE_LIST_COMPARISONS = 8192
# Columns of a row sum's program at the most, and those of a warp: 16 bytes a thread.
ROW_SUM_COLUMNS = 1024
ROW_SUM_COLUMNS_OF_A_WARP = 256
MOST_UNROLLED = 8


class TritonMoeMlp:
    """Backend of the fused kernels; CUDA with compute capability 8.0 or newer, ROCm, and the
    interpreter. bf16 and fp16 accumulate in fp32; fp32 multiplies in fp32."""

    def __init__(self, activation: str, tiles: TileTable = DEFAULTS) -> None:
        self.act, self.tiles = activation_called(activation), tiles
        self._configs: dict[tuple[str, ExpertShape, torch.device, int], TileConfig] = {}

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
        if not runs.max_pairs:
            return
        self.up(x_RH, w_in_eGH, index=index, runs=runs, z_LG=z_LG, a_LI=a_LI)
        config = self._config("down", self._shape(w_out_eHI), runs.max_pairs, a_LI.device)
        _rows_times_weight(config, a_LI, w_out_eHI, runs=runs, out_LN=y_LH, transposed=True)

    def up(
        self, x_RH: Tensor, w_in_eGH: Tensor, *, index: PairIndex, runs: Runs,
        z_LG: Tensor, a_LI: Tensor,
    ) -> None:  # fmt: skip
        """The first half of `forward`: z and a of the pairs in ``runs``."""
        H, I = x_RH.shape[1], a_LI.shape[1]
        shape = ExpertShape(H, I, len(w_in_eGH), self.act.gated, x_RH.dtype)
        config = self._config("up", shape, runs.max_pairs, x_RH.device)
        tiles = tile_list(runs, config.m)
        up_kernel[(tiles.shape[1] * triton.cdiv(I, config.n),)](
            x_RH, index.row_L, stacked_weight(w_in_eGH, I, config),
            z_LG, a_LI, tiles, tiles.shape[1],
            H=H, I=I, GATED=self.act.gated, ACTIVATION=self.act.name,
            TMA=config.tma, BM=config.m, BN=config.n, BK=config.k, **_launch(config),
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
        num_rows, H = rows.stop - rows.start, v_LH.shape[1]
        if not num_rows:
            return
        block = row_sum_columns(H)
        mean_pairs = triton.cdiv(v_LH.shape[0], index.num_rows)
        row_sum_kernel[(num_rows, triton.cdiv(H, block))](
            v_LH, v_LH if score_L is None else score_L, index.by_row_L, index.row_offsets_R1,
            out_RH, rows.start,
            H=H, SCORED=score_L is not None,
            UNROLL=min(MOST_UNROLLED, triton.next_power_of_2(max(mean_pairs, 1))),
            BH=block, num_warps=max(1, block // ROW_SUM_COLUMNS_OF_A_WARP),
        )  # fmt: skip

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
        if not runs.max_pairs:
            return
        self.da(
            dy_RH, score_L, z_LG, w_out_eHI,
            index=index, runs=runs, dz_LG=dz_LG, a_LI=a_LI, dscore_L=dscore_L,
        )  # fmt: skip
        config = self._config("dx", self._shape(w_out_eHI), runs.max_pairs, dz_LG.device)
        _rows_times_weight(config, dz_LG, w_in_eGH, runs=runs, out_LN=dx_LH, transposed=False)

    def da(
        self, dy_RH: Tensor, score_L: Tensor, z_LG: Tensor, w_out_eHI: Tensor,
        *, index: PairIndex, runs: Runs, dz_LG: Tensor, a_LI: Tensor, dscore_L: Tensor,
    ) -> None:  # fmt: skip
        """The first half of `dgrad`: dz, a_scaled and dscore of the pairs in ``runs``."""
        H, I, L = dy_RH.shape[1], a_LI.shape[1], a_LI.shape[0]
        config = self._config("dgrad", self._shape(w_out_eHI), runs.max_pairs, dy_RH.device)
        tiles = tile_list(runs, config.m)
        num_tiles, num_blocks = tiles.shape[1], triton.cdiv(I, config.n)
        partial = torch.empty(num_blocks, L, dtype=torch.float32, device=dy_RH.device)
        dgrad_kernel[(num_tiles * num_blocks,)](
            dy_RH, index.row_L, weight(w_out_eHI, config, rows=config.k, cols=config.n),
            score_L, z_LG, dz_LG, a_LI, partial, tiles, num_tiles, L,
            H=H, I=I, GATED=self.act.gated, ACTIVATION=self.act.name,
            TMA=config.tma, BM=config.m, BN=config.n, BK=config.k, CHUNKS=config.chunks,
            **_launch(config),
        )  # fmt: skip
        sum_dscore(partial, dscore_L, tiles, config.m)

    def wgrad(
        self, x_RH: Tensor, dy_RH: Tensor, dz_LG: Tensor, a_LI: Tensor, *, index: PairIndex
    ) -> tuple[Tensor, Tensor]:
        e, H, G, I = index.num_experts, x_RH.shape[1], dz_LG.shape[1], a_LI.shape[1]
        if not len(index.row_L) or not len(x_RH):
            return x_RH.new_zeros(e, G, H), x_RH.new_zeros(e, H, I)
        dw_in_eGH, dw_out_eHI = x_RH.new_empty(e, G, H), x_RH.new_empty(e, H, I)
        shape, pairs, device = self._shape(dw_out_eHI), len(index.row_L), x_RH.device
        config = self._config("wgrad_out", shape, pairs, device)
        _weight_gradient(config, dy_RH, a_LI, index, dw_out_eHI, gathered_first=True)
        config = self._config("wgrad_in", shape, pairs, device)
        _weight_gradient(config, x_RH, dz_LG, index, dw_in_eGH, gathered_first=False)
        return dw_in_eGH, dw_out_eHI

    def _shape(self, w_out_eHI: Tensor) -> ExpertShape:
        e, H, I = w_out_eHI.shape
        return ExpertShape(H, I, e, self.act.gated, w_out_eHI.dtype)

    def _config(
        self, kernel: str, shape: ExpertShape, pairs: int, device: torch.device
    ) -> TileConfig:
        """Found once for a bucket of ``pairs``, as every launch asks."""
        if has_overrides():
            return self._find_config(kernel, shape, pairs, device)
        key = (kernel, shape, device, bucket_of(pairs))
        if key not in self._configs:
            self._configs[key] = self._find_config(kernel, shape, pairs, device)
        return self._configs[key]

    def _find_config(
        self, kernel: str, shape: ExpertShape, pairs: int, device: torch.device
    ) -> TileConfig:
        return config_for(
            kernel,
            dtype=shape.dtype,
            columns=columns_of(kernel, shape),
            has_tma=_rows_fit(kernel, shape) and _has_tma(device),
            tuned=self.tiles.pick(kernel, shape, pairs),
        )


def _rows_fit(kernel: str, shape: ExpertShape) -> bool:
    """Whether the rows that a kernel reads by TMA are multiples of 16 bytes."""
    widths = {
        "up": (shape.H, shape.I),
        "down": (shape.I, shape.H),
        "dgrad": (shape.H, shape.I),
        "dx": (shape.G, shape.H),
        "wgrad_out": (shape.I,),
        "wgrad_in": (shape.G,),
    }
    return all(width * shape.dtype.itemsize % 16 == 0 for width in widths[kernel])


@cache
def _has_tma(device: torch.device) -> bool:
    if not torch.cuda.is_available():
        # The interpreter reads descriptors like the hardware does.
        return True
    # Tensors without memory stand for those of the current GPU.
    gpu = device if device.type == "cuda" else None
    return torch.version.hip is None and torch.cuda.get_device_capability(gpu) >= (9, 0)


def _launch(config: TileConfig) -> dict[str, int]:
    return {"num_warps": config.num_warps, "num_stages": config.num_stages}


def row_sum_columns(H: int) -> int:
    """The largest power of two that divides H, so that no load is half empty; else one over H."""
    dividing = min(ROW_SUM_COLUMNS, H & -H)
    if dividing >= ROW_SUM_COLUMNS_OF_A_WARP:
        return dividing
    padded: int = triton.next_power_of_2(H)
    return min(ROW_SUM_COLUMNS, padded)


def tile_list_slots(padded_experts: int) -> int:
    """Tiles that one program of the tile list finds, 1 to 32."""
    return max(1, min(32, TILE_LIST_COMPARISONS // padded_experts))


def tile_list(runs: Runs, m: int) -> Tensor:
    """int32 [3, tiles] of `tile_list_kernel`, made once per tile height for all blocks together."""
    blocks = runs.blocks
    derived = runs.derived if blocks is None else blocks.derived
    if ("tiles", m) not in derived:
        if blocks is None:
            lists = _tile_lists(runs.bounds_2e[None], [runs.max_pairs], m, exact=False)
        else:
            lists = _tile_lists(blocks.bounds_b2e, blocks.pairs_b, m, exact=True)
        derived["tiles", m] = lists
    made: Tensor = derived["tiles", m][runs.number]
    return made


def _tile_lists(bounds_b2e: Tensor, pairs_b: list[int], m: int, *, exact: bool) -> list[Tensor]:
    num_blocks, _, num_experts = bounds_b2e.shape
    # Every expert may have a ragged tile beside its whole ones.
    num_tiles_b = [triton.cdiv(pairs, m) + min(num_experts, pairs) for pairs in pairs_b]
    most = max(num_tiles_b)
    # Every list begins at a multiple of 16 bytes.
    stride = triton.cdiv(3 * most, 4) * 4
    lists = bounds_b2e.new_empty(num_blocks, stride)
    padded = triton.next_power_of_2(num_experts)
    slots = tile_list_slots(padded)
    tile_list_kernel[(triton.cdiv(most, slots), num_blocks)](
        bounds_b2e, lists, most, stride, EXACT=exact,
        E=num_experts, E_POW2=padded, BM=m, SLOTS=slots, num_warps=4,
    )  # fmt: skip
    return [tiles[: 3 * num].view(3, num) for tiles, num in zip(lists, num_tiles_b, strict=True)]


def sum_dscore(partial: Tensor, dscore_L: Tensor, tiles: Tensor, m: int) -> None:
    """dscore of the pairs in ``tiles`` of height m, from fp32 [column blocks, L]."""
    num_blocks, L = partial.shape
    dscore_kernel[(tiles.shape[1],)](
        partial, dscore_L, tiles, tiles.shape[1], L, BLOCKS=num_blocks, BM=m, num_warps=4
    )


def _rows_times_weight(
    config: TileConfig, v_LK: Tensor, w: Tensor, *, runs: Runs, out_LN: Tensor, transposed: bool
) -> None:
    K, N = v_LK.shape[1], out_LN.shape[1]
    tiles = tile_list(runs, config.m)
    rows, cols = (config.n, config.k) if transposed else (config.k, config.n)
    rows_kernel[(tiles.shape[1] * triton.cdiv(N, config.n),)](
        ragged(v_LK, config, rows=config.m, cols=config.k),
        weight(w, config, rows=rows, cols=cols),
        ragged(out_LN, config, rows=config.m, cols=config.n),
        tiles, tiles.shape[1],
        K=K, N=N, TRANSPOSED=transposed,
        TMA=config.tma, BM=config.m, BN=config.n, BK=config.k, **_launch(config),
    )  # fmt: skip


def _weight_gradient(
    config: TileConfig, gathered_RH: Tensor, v_LW: Tensor, index: PairIndex, dw: Tensor,
    *, gathered_first: bool,
) -> None:  # fmt: skip
    H, W = gathered_RH.shape[1], v_LW.shape[1]
    m, n = (H, W) if gathered_first else (W, H)
    bh, bw = (config.m, config.n) if gathered_first else (config.n, config.m)
    blocks = triton.cdiv(m, config.m) * triton.cdiv(n, config.n)
    wgrad_kernel[(index.num_experts * blocks,)](
        gathered_RH, index.row_L, ragged(v_LW, config, rows=config.k, cols=bw),
        index.offsets_e1, dw,
        H=H, W=W, GATHERED_FIRST=gathered_first,
        TMA=config.tma, BH=bh, BW=bw, BK=config.k, STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
