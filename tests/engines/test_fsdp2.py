"""When parameters are gathered."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from ranks import run_ranks
from test_parity import CPU, LAW, config_for, own_batches
from torch.utils._python_dispatch import TorchDispatchMode

from distmoe.engines import make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step

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
    # Root, first and second block; the third with the second; nothing is left for it.
    assert forward == [1 + 1 + 2, 1 + 1 + 2 + 2, 6]
    # Backward the third alone; its experts and the second block; the first. The root is whole.
    assert backward == [6 + 1, 7 + 1 + 2, 10 + 1]
    assert total == 11


def test_what_is_not_freed_is_not_gathered_again() -> None:
    _, _, total = gathers(reshard=False)
    assert total == 6
