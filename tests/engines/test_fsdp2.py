"""When parameters are gathered and gradients reduced, and that a checkpoint has them sharded."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from parity_runs import CPU, LAW, config_for, own_batches
from ranks import run_ranks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmoe.engines import make_engine
from distmoe.mesh import build_mesh
from distmoe.train.step import train_step, validation_loss

WORLD, EP = 4, 2
# Three blocks, of which the second and third have experts, embedding, head and the last norm.
UNITS = 3 + 2 + 3
OPERATORS = {"fsdp.all_gather_copy_in": "gathers", "fsdp.chunk_cat": "reduces"}


class CountCollectives(TorchDispatchMode):
    """How many units of FSDP were gathered and reduced so far."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).rpartition(".")[0]
        if name in OPERATORS:
            self.counts[OPERATORS[name]] += 1
        return func(*args, **(kwargs or {}))


def collectives(**settings: Any) -> tuple[list[int], list[int], list[dict[str, int]]]:
    """Of a step of two micro-batches: units gathered before each block's first forward and
    backward; and counts of every micro-batch, all-reduces of its backward only. The same on all
    ranks."""

    def run(rank: int) -> tuple[list[int], list[int], list[dict[str, int]]]:
        values = {key.replace("__", "."): value for key, value in settings.items()}
        config = config_for(WORLD, EP, 1, settings=values)
        engine = make_engine(config, build_mesh(config.parallel, device_type="cpu"), CPU)
        mode = CountCollectives()
        forward: list[int] = []
        backward: list[int] = []
        micro_batches: list[dict[str, int]] = []
        for block in engine.model.blocks:
            block.register_forward_pre_hook(lambda *_: forward.append(mode.counts["gathers"]))
            block.register_full_backward_pre_hook(
                lambda *_: backward.append(mode.counts["gathers"])
            )
        real = engine.backward

        def counting(loss: Any, last: bool) -> None:
            met.pop(rank, None)
            real(loss, last=last)
            if rank in met:
                mode.counts["all-reduces"] = met[rank]
            micro_batches.append(dict(mode.counts))
            mode.counts.clear()

        engine.backward = counting
        batches = own_batches(0, rank, WORLD, config.train.micro_batch_size)
        options = {"lr": 1e-3, "moe": config.moe, "device": CPU, "group": dist.group.WORLD}
        with mode:
            train_step(engine, batches, **options)
        return forward[:3], backward[:3], micro_batches

    met: Counter[int] = Counter()
    all_reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        met[dist.get_rank()] += 1
        return all_reduce(*args, **kwargs)

    with patch.object(dist, "all_reduce", counted):
        first, *others = run_ranks(run, WORLD)
    assert all(other == first for other in others)
    return first


def test_a_block_finds_the_next_one_gathered_and_none_is_gathered_twice() -> None:
    forward, backward, micro_batches = collectives()
    # Root, embedding, first and second block; the third with the second; the head with the third.
    assert forward == [2 + 1 + 2, 2 + 1 + 2 + 2, UNITS]
    # Backward the third with the head, which is there; with the third the second; the first.
    assert backward == [UNITS + 2, UNITS + 2 + 2, UNITS + 2 + 2 + 1]
    # Blocks twice. The embedding's weights are not needed again.
    assert micro_batches == 2 * [{"gathers": UNITS + 5, "reduces": UNITS}]


def test_what_is_kept_whole_is_gathered_and_reduced_once_a_step() -> None:
    *_, micro_batches = collectives(
        parallel__reshard_after_forward=False, parallel__reduce_gradients="step"
    )
    # The second gathers the embedding.
    assert micro_batches == [{"gathers": UNITS}, {"gathers": 1, "reduces": UNITS}]


def test_replicas_meet_once_a_step() -> None:
    *_, micro_batches = collectives(parallel__dp_replicate=2, parallel__dp_shard=2)
    # No rank shares its experts with another one.
    counts = {"gathers": UNITS + 5 - 2 * 2, "reduces": UNITS}
    assert micro_batches == [counts, counts | {"all-reduces": UNITS}]


def test_a_checkpoint_after_validation_has_shards_and_their_moments() -> None:
    """Of the root, and of blocks that a forward leaves gathered."""

    def run(rank: int) -> None:
        settings = {"parallel.reshard_after_forward": False}
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
