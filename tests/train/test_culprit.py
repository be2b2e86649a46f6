"""A step that is not finite names what was not finite first, and on which ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from parity_runs import CPU, LAW, config_for, own_batches
from ranks import run_ranks

from distmoe.engines import Engine, make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import StepOutcome, train_step

NAN = float("nan")


def spoil_the_gradient(engine: Engine, rank: int) -> None:
    if rank == 1:
        backward = engine.backward
        engine.backward = lambda loss, last: backward(loss * NAN, last=last)


def spoil_the_second_micro_batch(engine: Engine, rank: int) -> None:
    seen = []

    def spoil(module: torch.nn.Module, inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        seen.append(embedded)
        return embedded * (NAN if rank == 1 and len(seen) == 2 else 1.0)

    engine.model.embedding.register_forward_hook(spoil)


def spoil_a_router(engine: Engine, rank: int) -> None:
    with torch.no_grad():
        engine.model.blocks[2].mlp.router_EH.mul_(NAN)


def spoil_the_head(engine: Engine, rank: int) -> None:
    if rank == 0:
        engine.model.final_norm.register_forward_hook(lambda m, i, out: out * NAN)


def step(rank: int, world: int, engine_name: str, spoil: Callable[[Engine, int], None]):
    config = config_for(world, world, LAW[world, world], engine=engine_name)
    mesh = build_mesh(config.parallel, device_type="cpu") if world > 1 else None
    engine = make_engine(config, mesh, CPU)
    spoil(engine, rank)
    batches = own_batches(0, rank, world, config.train.micro_batch_size)
    group = dist.group.WORLD if world > 1 else None
    return train_step(engine, batches, lr=1e-3, moe=config.moe, device=CPU, group=group)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_the_gradient, "gradient of rank 1, micro-batch 0"),
        # Blocks 1 and 2 have experts.
        (spoil_the_second_micro_batch, "router logits of layer 1 of rank 1, micro-batch 1"),
        (spoil_a_router, "router logits of layer 2 of ranks 0, 1, micro-batch 0"),
        (spoil_the_head, "loss of rank 0, micro-batch 0"),
    ],
)
def test_the_first_is_named(spoil: Callable[[Engine, int], None], words: str) -> None:
    for outcome in run_ranks(partial(step, world=2, engine_name="fsdp2", spoil=spoil), 2):
        assert outcome.skipped
        assert outcome.not_finite == words


def test_a_gradient_of_a_weight_alone() -> None:
    def spoil(engine: Engine, rank: int) -> None:
        engine.model.head.weight.register_hook(lambda gradient: gradient * NAN)

    outcome: StepOutcome = step(0, 1, "single", spoil)
    assert outcome.skipped
    assert outcome.not_finite == "a weight's gradient, and nothing before it on any rank"


def test_a_good_step_accuses_nobody() -> None:
    outcome: StepOutcome = step(0, 1, "single", lambda engine, rank: None)
    assert not outcome.skipped
    assert outcome.not_finite == ""
