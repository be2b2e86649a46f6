"""Mixed precision, and steps that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parity_runs import CPU, LAW, config_for, own_batches, run
from ranks import run_ranks
from test_training_by_hand import assert_bf16_as_good_as_by_hand
from torch._subclasses.fake_tensor import FakeTensorMode
from training_by_hand import BF16, STEPS

from distmoe.config import OptimConfig
from distmoe.engines import make_engine
from distmoe.engines.adamw import build_adamw
from distmoe.engines.optimizer_state import optimizer_state
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step


@pytest.mark.parametrize(("world", "ep", "engine"), [(1, 1, "single"), (2, 2, "fsdp2")])
def test_bf16_is_as_good_as_by_hand(world: int, ep: int, engine: str) -> None:
    micro = LAW[world, ep]
    for result in run(world, ep, micro, steps=STEPS, engine=engine, **BF16):
        assert all(weight.dtype == np.float32 for weight in result["final"].values())
        assert_bf16_as_good_as_by_hand(result, config_for(world, ep, micro, **BF16))


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    def poisoned(rank: int) -> tuple[bool, bool, dict[str, Any], dict[str, Any]]:
        config = config_for(2, 2, LAW[2, 2])
        engine = make_engine(config, build_mesh(config.parallel, device_type="cpu"), CPU)
        before = {n: p.to_local().clone() for n, p in engine.model.named_parameters()}
        real = engine.backward

        def spoil(loss: torch.Tensor, last: bool) -> None:
            real(loss * (float("nan") if rank == 1 else 1.0), last=last)

        options = {"lr": 1e-3, "moe": config.moe, "device": CPU, "group": dist.group.WORLD}
        batches = own_batches(0, rank, 2, config.train.micro_batch_size)
        engine.backward = spoil
        first = train_step(engine, batches, **options)
        after = {n: p.to_local().clone() for n, p in engine.model.named_parameters()}
        engine.backward = real
        second = train_step(engine, batches, **options)
        return first.skipped, second.skipped, before, after

    for first, second, before, after in run_ranks(poisoned, 2):
        assert first
        assert not second
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_adamw_of_a_gpu_is_fused_and_counts_its_steps_there() -> None:
    with FakeTensorMode():
        named = {"w": torch.nn.Parameter(torch.zeros(4, 3, device="cuda"))}
        optimizer = build_adamw(named.items(), OptimConfig(), {})
        # Made before the first step, so that a checkpoint can be loaded into it.
        state = optimizer_state(optimizer, named.items())["w"]
        named["w"].grad = torch.ones_like(named["w"])
        optimizer.step()
    assert all(group["fused"] for group in optimizer.param_groups)
    assert {tensor.device.type for tensor in state.values()} == {"cuda"}
