"""What activation checkpointing computes again."""

from __future__ import annotations

from collections import Counter

import pytest
from parity_runs import CPU, LAW, config_for, own_batches

from distmoe.engines import make_engine
from distmoe.train.step import train_step

# Forwards in one micro-batch of a block with a dense MLP and two with experts.
FORWARDS = {
    "none": {"GroupedQueryAttention": 3, "dense": 1, "MoE": 2},
    "selective": {"GroupedQueryAttention": 6, "dense": 2, "MoE": 2},
    "full": {"GroupedQueryAttention": 6, "dense": 2, "MoE": 4},
}


@pytest.mark.parametrize("mode", FORWARDS)
def test_forwards(mode: str) -> None:
    config = config_for(1, 1, LAW[1, 1], engine="single", activation_checkpoint=mode)
    engine = make_engine(config, None, CPU)
    forwards: Counter[str] = Counter()
    for block in engine.model.blocks:
        for part in (block.attention, block.mlp):
            name = type(part).__name__.replace("SwiGluMlp", "dense")
            part.register_forward_pre_hook(lambda *_, name=name: forwards.update([name]))
    batches = own_batches(0, 0, 1, config.train.micro_batch_size)[:1]
    train_step(engine, batches, lr=1e-3, moe=config.moe, device=CPU, group=None)
    assert forwards == FORWARDS[mode]
