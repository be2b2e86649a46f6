"""The experts' biases in training: steps that are skipped, and checkpoints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_runs import BIASED, CPU, LAW, config_for, own_batches
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from distmoe.checkpoint.load import load
from distmoe.config import Config
from distmoe.engines import Engine, make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step

RUNS = [(1, 1, "single"), (2, 2, "fsdp2")]
OTHERS = [(1, 1, "single"), (2, 1, "fsdp2"), (4, 2, "fsdp2")]


def start(world: int, ep: int, name: str, **changes: Any) -> tuple[Config, Engine]:
    config = config_for(world, ep, LAW[world, ep], engine=name, **changes)
    mesh = None if name == "single" else build_mesh(config.parallel, device_type="cpu")
    return config, make_engine(config, mesh, CPU)


def step(engine: Engine, config: Config, number: int, rank: int, world: int) -> float:
    return train_step(
        engine,
        own_batches(number, rank, world, config.train.micro_batch_size),
        lr=1e-3,
        moe=config.moe,
        device=CPU,
        group=dist.group.WORLD if world > 1 else None,
    ).loss


def biases(engine: Engine) -> list[list[int]]:
    return [layer.bias_E.tolist() for layer in engine.model.moe_layers()]


def first_half(rank: int, world: int, ep: int, name: str, folder: Path) -> Any:
    """Two steps, a checkpoint, two more."""
    config, engine = start(world, ep, name, **BIASED)
    for number in range(2):
        step(engine, config, number, rank, world)
    # Not by CheckpointStore: its thread is no rank among threads.
    save(engine.state_dict(), checkpoint_id=folder)
    kept = biases(engine)
    losses = [step(engine, config, number, rank, world) for number in (2, 3)]
    return kept, losses, biases(engine)


def second_half(rank: int, world: int, ep: int, name: str, folder: Path) -> Any:
    config, engine = start(world, ep, name, **BIASED)
    engine.load_state_dict(load(folder, engine.state_dict()))
    kept = biases(engine)
    losses = [step(engine, config, number, rank, world) for number in (2, 3)]
    return kept, losses, biases(engine)


Halves = Callable[[int, int, str], tuple[list[Any], Path]]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Halves:
    """What every rank of a first half gave, and its checkpoint; each is run once."""

    @functools.cache
    def run(world: int, ep: int, name: str) -> tuple[list[Any], Path]:
        folder = tmp_path_factory.mktemp(f"{name}-{world}-{ep}")
        return run_ranks(first_half, world, world, ep, name, folder), folder

    return run


@pytest.mark.parametrize(("world", "ep", "name"), RUNS)
def test_resume_is_an_unbroken_run(world: int, ep: int, name: str, begun: Halves) -> None:
    unbroken, folder = begun(world, ep, name)
    assert any(any(bias_E) for bias_E in unbroken[0][0])
    assert run_ranks(second_half, world, world, ep, name, folder) == unbroken


@pytest.mark.parametrize(("world", "ep", "name"), OTHERS)
def test_a_checkpoint_with_biases_loads_on_other_ranks(
    world: int, ep: int, name: str, begun: Halves
) -> None:
    ranks, folder = begun(2, 2, "fsdp2")
    kept, losses, last = ranks[0]
    for found in run_ranks(second_half, world, world, ep, name, folder):
        assert (found[0], found[2]) == (kept, last)
        assert found[1] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("world", "ep", "name"), RUNS)
def test_a_model_without_biases_refuses_a_checkpoint_with_them(
    world: int, ep: int, name: str, begun: Halves
) -> None:
    def load_plain(rank: int) -> str:
        _, engine = start(world, ep, name)
        with pytest.raises(ValueError, match="does not fit this model") as caught:
            load(folder, engine.state_dict())
        return str(caught.value)

    _, folder = begun(world, ep, name)
    for message in run_ranks(load_plain, world):
        assert message.endswith(
            "which has no blocks.1.mlp.bias_E; it needs moe.bias_update_rate > 0"
        )


@pytest.mark.parametrize(("world", "ep", "name"), RUNS)
def test_an_engine_takes_the_biases_of_a_state(world: int, ep: int, name: str) -> None:
    def run(rank: int) -> list[list[int]]:
        _, engine = start(world, ep, name, **BIASED)
        state = engine.state_dict()
        state["model"] = {
            n: t + 5 if n.endswith("bias_E") else t for n, t in state["model"].items()
        }
        engine.load_state_dict(state)
        return biases(engine)

    assert run_ranks(run, world) == [[[5] * 8] * 2] * world


@pytest.mark.parametrize(("world", "ep", "name"), RUNS)
def test_a_checkpoint_without_biases_has_parameters_only(world: int, ep: int, name: str) -> None:
    def names(rank: int) -> bool:
        _, engine = start(world, ep, name)
        return set(engine.state_dict()["model"]) == {n for n, _ in engine.model.named_parameters()}

    assert all(run_ranks(names, world))


@torch.no_grad()
def fill(weight: DTensor, value: torch.Tensor | float) -> None:
    local = weight.to_local()
    local.copy_(torch.as_tensor(value).expand_as(local))


def steps_around(rank: int, spoil: str) -> tuple[list[list[int]], list[list[int]]]:
    """Biases after step 0, and after step 2; ``spoil``: the pass of step 1, which is not there if
    none is spoilt, that is not finite."""
    config, engine = start(2, 2, "fsdp2", **BIASED)
    real, weight = engine.backward, engine.model.final_norm.weight
    step(engine, config, 0, rank, 2)
    before, kept = biases(engine), weight.to_local().clone()
    if spoil:
        if spoil == "forward":
            fill(weight, float("nan"))
        else:
            engine.backward = lambda loss, last: real(loss * float("nan"), last=last)  # type: ignore[method-assign]
        step(engine, config, 1, rank, 2)
        assert biases(engine) == before
        fill(weight, kept)
        engine.backward = real  # type: ignore[method-assign]
    step(engine, config, 2, rank, 2)
    return before, biases(engine)


def test_a_skipped_step_moves_no_bias_and_counts_nothing() -> None:
    plain = run_ranks(steps_around, 2, "")
    assert plain[0][0] != plain[0][1]
    for spoil in ("forward", "backward"):
        assert run_ranks(steps_around, 2, spoil) == plain


def test_initial_biases_are_zero_on_memory_that_was_used() -> None:
    real = torch.nn.Module.to_empty

    def dirty(self: torch.nn.Module, **options: Any) -> torch.nn.Module:
        module = real(self, **options)
        for buffer in module.buffers():
            buffer.fill_(123)
        return module

    torch.nn.Module.to_empty = dirty  # type: ignore[method-assign]
    try:
        _, engine = start(1, 1, "single", **BIASED)
    finally:
        torch.nn.Module.to_empty = real  # type: ignore[method-assign]
    assert not any(any(bias_E) for bias_E in biases(engine))
