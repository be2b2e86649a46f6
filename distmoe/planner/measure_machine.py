"""Everything that `distmoe doctor comm` measures: links, all-gather, copies, products."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import torch

from distmoe.comm import make_exchange
from distmoe.config import Config
from distmoe.config.batch import rank_tokens
from distmoe.config.dtype import with_dtype
from distmoe.engines import compute_dtype
from distmoe.kernels.moe_mlp import backend_for
from distmoe.planner.environment import environment
from distmoe.planner.machine_profile import Link, Origin, Profile
from distmoe.planner.measure_collectives import measure_collectives, shares_of_a_ring
from distmoe.planner.measure_device import (
    device_memory,
    measure_attention,
    measure_copy,
    measure_dense,
    measure_gemm,
    measure_launch,
)
from distmoe.planner.measure_links import LinkFigures, measure_all_gather, measure_links
from distmoe.runtime import Runtime

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class MachineFigures:
    """``own``, ``launch_s``, ``dense_flops`` and ``attention_flops``: medians over ranks;
    ``gemm_flops`` of every rank in dtype ``dtype`` by ``kernel``. ``all_gather_s`` of
    ``all_gather_bytes`` from each rank. ``collective_s``: of `measure_collectives`, on rank 0; none
    for one rank. ``memory_bytes`` of a rank, the least of all. ``where``: device and versions."""

    ranks: int
    ranks_per_node: int
    exchange: str
    own: Link
    links: list[LinkFigures]
    all_gather_bytes: int
    all_gather_s: float
    kernel: str
    dtype: str
    gemm_flops: list[float]
    dense_flops: float
    attention_flops: float
    collective_s: dict[str, float]
    memory_bytes: int
    launch_s: float
    date: str
    where: dict[str, object]

    def profile(self) -> Profile:
        """What the cost model reads."""
        found = self._without_collectives()
        shares = shares_of_a_ring(
            self.collective_s, found, ranks=self.ranks, ranks_per_node=self.ranks_per_node
        )
        return replace(found, collective_share=shares)

    def _without_collectives(self) -> Profile:
        versions = self.where["versions"]
        known = versions if isinstance(versions, dict) else {}
        return Profile(
            links={"own": self.own} | {f.name: f.link(self.ranks_per_node) for f in self.links},
            gemm_flops={self.dtype: statistics.median(self.gemm_flops)},
            host_latency_s=self.launch_s,
            origin=Origin(
                device=str(self.where["device"]),
                date=self.date,
                note=f"{self.ranks} ranks, {self.ranks_per_node} on a node, {self.exchange}, "
                f"{self.kernel} kernels",
                versions={name: known[name] for name in ("distmoe", "torch") if known.get(name)},
            ),
            dense_flops={self.dtype: self.dense_flops},
            attention_flops={self.dtype: self.attention_flops} if self.attention_flops else {},
            memory_bytes=self.memory_bytes,
            ranks_per_node=self.ranks_per_node,
        )


def measure_machine(config: Config, runtime: Runtime, *, ranks_per_node: int) -> MachineFigures:
    """The figures of a resolved config's machine, the same on every rank; collective."""
    config, moe, device = with_dtype(config, runtime.device.type), config.moe, runtime.device
    exchange = make_exchange(runtime.group, moe.dispatch.exchange)
    dtype = compute_dtype(config)
    links = measure_links(exchange, ranks_per_node=ranks_per_node, device=device)
    all_gather_s = measure_all_gather(exchange, moe.num_experts + 1, device=device)
    collective_s = measure_collectives(runtime.group, device=device) if runtime.group else {}
    mine = _of_this_device(config, device, dtype)
    mine.append(device_memory(device, ranks_per_node=ranks_per_node))
    all_ranks = exchange.all_gather(
        torch.tensor(mine, dtype=torch.float64, device=device), kind="figures"
    ).tolist()
    *speeds, gemm_flops, memory = zip(*all_ranks, strict=True)
    latency, copied, launch, dense, attention = map(statistics.median, speeds)
    return MachineFigures(
        ranks=exchange.size,
        ranks_per_node=ranks_per_node,
        exchange=type(exchange).__name__,
        own=Link(latency, copied),
        links=links,
        all_gather_bytes=4 * (moe.num_experts + 1),
        all_gather_s=all_gather_s,
        kernel=backend_for(moe.kernel, device),
        dtype=DTYPE_NAMES[dtype],
        gemm_flops=list(gemm_flops),
        dense_flops=dense,
        attention_flops=attention,
        collective_s=collective_s,
        memory_bytes=int(min(memory)),
        launch_s=launch,
        date=datetime.now(UTC).date().isoformat(),
        where=environment(device),
    )


def _of_this_device(config: Config, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Latency and rate of a copy, a launch, and FLOP/s of blocks, attention and experts."""
    moe, model = config.moe, config.model
    tokens = rank_tokens(config)
    own = measure_copy(device)
    launch_s = measure_launch(moe, device=device, dtype=dtype)
    expert_flops = measure_gemm(
        moe,
        num_experts=max(1, moe.num_experts // config.parallel.ep),
        pairs=tokens * moe.top_k,
        device=device,
        dtype=dtype,
    )
    dense = measure_dense(model, tokens=tokens, device=device, dtype=dtype)
    attention = measure_attention(model, seq_len=config.data.seq_len, device=device, dtype=dtype)
    return [own.latency_s, own.bytes_per_s, launch_s, dense, attention, expert_flops]
