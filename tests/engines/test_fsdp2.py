"""When parameters are gathered, and that a checkpoint has them sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from test_parity import CPU, LAW, config_for, own_batches
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmoe.engines import make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step, validation_loss

WORLD, EP = 4, 2


class CountGathers(TorchDispatchMode):
    """How many units of FSDP were gathered so far."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += str(func).startswith("fsdp.all_gather_copy_in")
        return func(*args, **(kwargs or {}))


def gathers(*, reshard: bool) -> tuple[list[int], list[int], int]:
    """Units gathered before each block's forward and backward, and in all; the same on all ranks.
    The second and third of three blocks have experts, which are units of their own."""

    def run(rank: int) -> tuple[list[int], list[int], int]:
        settings = {"parallel.reshard_after_forward": reshard}
        config = config_for(WORLD, EP, LAW[WORLD, EP], settings=settings)
        engine = make_engine(config, build_mesh(config.parallel, device_type="cpu"), CPU)
        gathered, forward, backward = CountGathers(), [], []
        for block in engine.model.blocks:
            block.register_forward_pre_hook(lambda *_: forward.append(gathered.count))
            block.register_full_backward_pre_hook(lambda *_: backward.append(gathered.count))
        batches = own_batches(0, rank, WORLD, config.train.micro_batch_size)[:1]
        options = {"lr": 1e-3, "moe": config.moe, "device": CPU, "group": dist.group.WORLD}
        with gathered:
            train_step(engine, batches, **options)
        return forward, backward, gathered.count

    first, *others = run_ranks(run, WORLD)
    assert all(other == first for other in others)
    return first


def test_a_block_finds_the_next_one_gathered_and_none_is_gathered_twice() -> None:
    forward, backward, total = gathers(reshard=True)
    # Root, embedding, first and second block; the third with the second; the head with the third.
    assert forward == [2 + 1 + 2, 2 + 1 + 2 + 2, 8]
    # Backward the third with the head, which is there; with the third the second; the first.
    assert backward == [8 + 2, 10 + 2, 12 + 1]
    # The embedding's weights are not needed again.
    assert total == 13


def test_what_is_not_freed_is_not_gathered_again() -> None:
    _, _, total = gathers(reshard=False)
    assert total == 8


@pytest.mark.parametrize("reshard", [True, False])
def test_a_checkpoint_after_validation_has_shards_and_their_moments(reshard: bool) -> None:
    def run(rank: int) -> None:
        settings = {"parallel.reshard_after_forward": reshard}
        config = config_for(2, 2, LAW[2, 2], settings=settings)
        engine = make_engine(config, build_mesh(config.parallel, device_type="cpu"), CPU)
        batches = own_batches(0, rank, 2, config.train.micro_batch_size)
        on = {"device": CPU, "group": dist.group.WORLD}
        train_step(engine, batches, lr=1e-3, moe=config.moe, **on)
        validation_loss(engine, [batches], **on)
        state = engine.state_dict()
        assert all(isinstance(weight, DTensor) for weight in state["model"].values())
        for name, own in state["optimizer"].items():
            assert own["step"] == 1, name
            assert own["exp_avg"].placements == state["model"][name].placements
        validation_loss(engine, [batches], **on)
        engine.load_state_dict(state | {"model": {n: 0 * w for n, w in state["model"].items()}})
        assert not any(weight.any() for weight in engine.state_dict()["model"].values())

    run_ranks(run, 2)
