"""Mixed precision, and steps that are not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_parity import CPU, LAW, STEPS, config_for, own_batches

from distmoe.engines import make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step


def losses(rank: int, world: int, ep: int, engine_name: str, dtype: str) -> list[float]:
    config = config_for(world, ep, LAW[world, ep], engine=engine_name)
    config = replace(config, train=replace(config.train, dtype=dtype))
    mesh = None if engine_name == "single" else build_mesh(config.parallel, device_type="cpu")
    engine = make_engine(config, mesh, CPU)
    found = [
        train_step(
            engine,
            own_batches(step, rank, world, config.train.micro_batch_size),
            lr=1e-3,
            moe=config.moe,
            device=CPU,
            group=None if mesh is None else dist.group.WORLD,
        ).loss
        for step in range(STEPS)
    ]
    state = engine.state_dict()
    assert all(p.dtype == torch.float32 for p in state["model"].values())
    return found


@pytest.mark.parametrize(("world", "ep", "engine"), [(1, 1, "single"), (2, 2, "fsdp2")])
def test_bf16_follows_fp32(world: int, ep: int, engine: str) -> None:
    exact = run_ranks(losses, 1, 1, 1, "single", "fp32")[0]
    rounded = run_ranks(losses, world, world, ep, engine, "bf16")[0]
    assert rounded != exact
    # bf16 keeps 8 bits; losses are means over many tokens.
    assert rounded == pytest.approx(exact, rel=2**-8)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    def poisoned(rank: int) -> tuple[bool, bool, dict[str, Any], dict[str, Any]]:
        config = config_for(2, 2, LAW[2, 2])
        engine = make_engine(config, build_mesh(config.parallel, device_type="cpu"), CPU)
        before = {n: p.to_local().clone() for n, p in engine.model.named_parameters()}
        real = engine.backward

        def spoil(loss: torch.Tensor) -> None:
            real(loss * (float("nan") if rank == 1 else 1.0))

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
