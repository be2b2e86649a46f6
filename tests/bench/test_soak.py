"""The soak: skewed tokens whose number changes, and growth that is seen."""

from __future__ import annotations

import torch.distributed as dist
from ranks import run_ranks

from distmoe import MoE, MoEConfig
from distmoe.bench.soak import Growth, Reading, growth, skewed_tokens, soak
from distmoe.config import RoundingConfig

CONFIG = MoEConfig(
    hidden_size=16, intermediate_size=8, num_experts=8, top_k=1, rounding=RoundingConfig(tile=4)
)


def test_one_rank_has_most_of_the_work_and_one_no_tokens() -> None:
    def run(rank: int) -> tuple[list[Reading], list[int]]:
        layer = MoE(CONFIG, dist.group.WORLD)
        layer.router_EH.data.fill_diagonal_(1.0)
        counts = [len(skewed_tokens(layer, step, 40)) for step in range(2)]
        return soak(layer, tokens=40, steps=3, every=3), counts

    results = run_ranks(run, 2)
    for (reading,), _ in results:
        assert reading.step == 3
        assert reading.busiest > 1.3
        assert reading.trimmed_mib > reading.allocated_mib > 0
        assert reading.live_tensors > 0
    for step, of_ranks in enumerate(zip(*(counts for _, counts in results), strict=True)):
        assert of_ranks[step] == 0 < of_ranks[1 - step]


def test_growth_after_the_first_fifth() -> None:
    def reading(step: int, trimmed_mib: float, live: int) -> Reading:
        return Reading(step, 0.0, 500.0, trimmed_mib, trimmed_mib / 2, live, 1.0, 1.0)

    readings = [reading(10, 50, 5), reading(20, 100, 12), reading(60, 103, 14)]
    assert growth([*readings, reading(100, 99, 12)]) == Growth(3.0, 1.5, 2)
    assert growth(readings[:1]) == Growth(0.0, 0.0, 0)
