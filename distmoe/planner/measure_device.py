"""Speed of one rank's device: copies, products of experts and blocks, attention, a launch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from distmoe.config import ModelConfig, MoEConfig
from distmoe.kernels.moe_mlp import MoeMlp, PairIndex, Runs, backend_for, load_backend
from distmoe.kernels.moe_mlp.activations import activation_called
from distmoe.kernels.moe_mlp.find_tiles import find_tiles
from distmoe.model.attention import attention_sizes
from distmoe.model.causal_attention import attend
from distmoe.planner.machine_profile import Link
from distmoe.planner.timing import median_seconds, wait_for

COPY_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}
"""More than a cache holds, and on a GPU enough that a launch does not count."""
PROBE_FLOPS = {"cpu": 2e9, "cuda": 4e12}
"""Of one timed call of the expert products, unless one tile has more."""
SMALL_BYTES = 1 << 10
LAUNCHES = 20
BUDGET_S = 0.5
TINY = 64
"""H and I of the expert whose time is all launch."""


def measure_copy(device: torch.device) -> Link:
    """A copy inside the device, rows read once and written once."""
    seconds = {}
    for size in (SMALL_BYTES, COPY_BYTES[device.type]):
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        seconds[size] = median_seconds(partial(target.copy_, source), device, budget_s=BUDGET_S)
    small, large = seconds.items()
    return Link.through(small, large)


def measure_gemm(
    moe: MoEConfig, *, num_experts: int, pairs: int, device: torch.device, dtype: torch.dtype
) -> float:
    """FLOP/s of the expert MLP's forward, by the kernels that ``moe.kernel`` means on ``device``.

    ``num_experts`` of the config's shape and ``pairs`` in all; fewer of both, but whole tiles,
    where they would take long.
    """
    I, H = moe.intermediate_size, moe.hidden_size
    G = activation_called(moe.activation).width(I)
    flops_per_pair = 2 * H * (G + I)
    tile = moe.rounding.tile
    affordable = int(PROBE_FLOPS[device.type] / (flops_per_pair * tile))
    tiles = max(1, min(affordable, pairs // tile))
    experts = min(num_experts, tiles)
    pairs_per_expert = tiles // experts * tile
    forward = _expert_forward(moe, experts, pairs_per_expert, device, dtype)
    seconds = median_seconds(forward, device, budget_s=BUDGET_S)
    return experts * pairs_per_expert * flops_per_pair / seconds


def measure_dense(
    model: ModelConfig, *, tokens: int, device: torch.device, dtype: torch.dtype
) -> float:
    """FLOP/s of a product of a block: ``tokens`` rows, or fewer where that takes long, with a
    matrix of H x H."""
    H = model.hidden_size
    rows = max(1, min(tokens, int(PROBE_FLOPS[device.type] / (2 * H * H))))
    x_TH = torch.randn(rows, H, device=device, dtype=dtype)
    w_HH = torch.randn(H, H, device=device, dtype=dtype)
    seconds = median_seconds(lambda: x_TH @ w_HH, device, budget_s=BUDGET_S)
    return 2 * rows * H * H / seconds


def measure_attention(
    model: ModelConfig, *, seq_len: int, device: torch.device, dtype: torch.dtype
) -> float:
    """FLOP/s of causal attention over one sequence, of those that the mask leaves; 0 for heads
    that no model can have."""
    sizes = attention_sizes(model)
    if not sizes.qk_dim or sizes.heads % sizes.kv_heads:
        return 0.0
    flops = seq_len * seq_len * (sizes.q + sizes.y)

    def drawn(heads: int, dim: int) -> Tensor:
        return torch.randn(1, heads, seq_len, dim, device=device, dtype=dtype)

    q_BASD, k_BASD = (drawn(heads, sizes.qk_dim) for heads in (sizes.heads, sizes.kv_heads))
    v_BASD = drawn(sizes.kv_heads, sizes.v_dim)
    seconds = median_seconds(
        lambda: attend(q_BASD, k_BASD, v_BASD, None), device, budget_s=BUDGET_S
    )
    return flops / seconds


def device_memory(device: torch.device, *, ranks_per_node: int) -> int:
    """Bytes that a rank may use: its GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_per_node


def measure_launch(moe: MoEConfig, *, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds until the expert kernels of one block are on their way: one pair, of a tiny shape."""
    tiny = MoEConfig(
        hidden_size=TINY,
        intermediate_size=TINY,
        kernel=moe.kernel,
        kernel_tiles=moe.kernel_tiles,
        activation=moe.activation,
    )
    forward = _expert_forward(tiny, 1, 1, device, dtype)
    forward()
    seconds = []
    for _ in range(LAUNCHES):
        wait_for(device)
        begun = time.perf_counter()
        forward()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _expert_forward(
    moe: MoEConfig,
    experts: int,
    pairs_per_expert: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """A forward of the expert MLP on rows of its own."""
    I, H = moe.intermediate_size, moe.hidden_size
    G = activation_called(moe.activation).width(I)
    L = experts * pairs_per_expert
    name = backend_for(moe.kernel, device)
    tiles = find_tiles(moe.kernel_tiles, name, device)
    mlp: MoeMlp = load_backend(name, moe.activation, tiles=tiles)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    x_RH, w_in_eGH, w_out_eHI = drawn(L, H), drawn(experts, G, H), drawn(experts, H, I)
    rows = torch.arange(L + 1, dtype=torch.int32, device=device)
    index = PairIndex(
        row_L=rows[:-1],
        offsets_e1=rows[:: max(1, pairs_per_expert)].contiguous(),
        by_row_L=rows[:-1],
        row_offsets_R1=rows,
    )
    runs = Runs.of_all(index)
    z_LG, a_LI, y_LH = drawn(L, G), drawn(L, I), drawn(L, H)
    return lambda: mlp.forward(
        x_RH, w_in_eGH, w_out_eHI, index=index, runs=runs, z_LG=z_LG, a_LI=a_LI, y_LH=y_LH
    )
