"""What a job holds: shards against the engine's own, formulas against real steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from distmoe.bench.live_storages import LiveStorages
from distmoe.config import Config, resolve
from distmoe.config.dtype import with_dtype
from distmoe.config.keys import with_values
from distmoe.data.batches import Batch
from distmoe.engines.fsdp2 import Fsdp2Engine
from distmoe.engines.single import SingleEngine
from distmoe.mesh import build_mesh
from distmoe.metrics.flops import parameter_counts
from distmoe.planner.block_activations import block_activations
from distmoe.planner.engine_costs import Job
from distmoe.planner.engine_costs.deepspeed import DeepSpeedCosts
from distmoe.planner.exchange_rows import exchange_rows
from distmoe.planner.job_memory import predict_memory, zero3_host_memory
from distmoe.planner.parameter_shapes import model_units
from distmoe.planner.step_moments import Moment, Stage
from distmoe.train.step import train_step

# Sizes that no number of ranks divides.
ODD: dict[str, Any] = {
    "run.device": "cpu",
    "model.vocab_size": 1001,
    "model.hidden_size": 96,
    "model.n_layers": 3,
    "model.n_dense_layers": 1,
    "model.n_heads": 6,
    "model.n_kv_heads": 2,
    "model.intermediate_size": 130,
    "moe.intermediate_size": 48,
    "moe.num_experts": 64,
    "moe.shared_intermediate_size": 24,
    "moe.rounding.tile": 8,
    "moe.dispatch.exchange": "p2p",
    "data.seq_len": 64,
}


def config_of(world: int, **settings: Any) -> Config:
    values = {key.replace("__", "."): value for key, value in settings.items()}
    batch = {"train.global_batch_size": world, "train.micro_batch_size": 1}
    return resolve(with_values(Config(), {**ODD, **batch, **values}), world, local_world=world)


@contextmanager
def first_of(world: int) -> Iterator[None]:
    """This process as the first rank of a group whose other ranks do not exist."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def stored(tensors: list[Tensor]) -> int:
    """Bytes of this rank's parts."""
    local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


LAYOUTS = [
    # World, replicas, ep, experts: 8 efsdp ranks have an expert each.
    (64, 1, 8, 64, "adamw"),
    # 2 experts for 8 ranks: cut by rows.
    (64, 1, 8, 16, "adamw"),
    # Every rank has its own experts; replicas.
    (64, 2, 32, 64, "adamw"),
    (4096, 8, 64, 512, "adamw"),
    (64, 1, 8, 16, "muon"),
    (64, 2, 32, 64, "muon"),
]


@pytest.mark.parametrize(("world", "replicas", "ep", "experts", "optimizer"), LAYOUTS)
def test_shards_are_the_engines_own(
    world: int, replicas: int, ep: int, experts: int, optimizer: str
) -> None:
    """Of the first rank, which has a whole chunk of everything."""
    settings = {"parallel__dp_replicate": replicas, "parallel__ep": ep, "optim__name": optimizer}
    config = config_of(world, moe__num_experts=experts, **settings)
    with first_of(world):
        mesh = build_mesh(config.parallel, device_type="cpu")
        engine = Fsdp2Engine(with_dtype(config, "cpu"), mesh, torch.device("meta"))
        parameters = list(engine.model.parameters())
        moments = [
            tensor
            for state in engine.state_dict()["optimizer"].values()
            for name, tensor in state.items()
            if name != "step"
        ]
        predicted = predict_memory(config, world)
        assert stored(parameters) == predicted.parameters
        assert stored(moments) == predicted.optimizer


@pytest.mark.parametrize("tied", [False, True])
def test_all_parameters_are_there(tied: bool) -> None:
    settings = {"model__tie_embeddings": tied, "parallel__engine": "single"}
    counts = parameter_counts(
        *[getattr(config_of(1, **settings), name) for name in ("model", "moe")]
    )
    for dtype, itemsize in (("fp32", 4), ("bf16", 2)):
        predicted = predict_memory(config_of(1, train__dtype=dtype, **settings), 1)
        assert predicted.parameters == (4 + itemsize) * counts.total
        assert predicted.optimizer == 8 * counts.total


def test_zero_stages_hold_less_and_less() -> None:
    by_stage = [
        predict_memory(
            config_of(
                8,
                parallel__engine="deepspeed",
                deepspeed__zero_stage=stage,
                deepspeed__bucket_elements=1000,
            ),
            8,
        )
        for stage in (1, 2, 3)
    ]
    states = [memory.parameters + memory.gradients + memory.optimizer for memory in by_stage]
    assert states[0] > states[1] > states[2]
    assert len({memory.optimizer for memory in by_stage[:2]}) == 1


def test_zero_3_gathers_the_experts_that_run_however_large_they_are() -> None:
    """Between the uses of parameters it keeps 10^9 elements; experts of a block are more here."""
    large = {"model__hidden_size": 4096, "moe__intermediate_size": 2048, "run__device": "cuda"}
    zero_3 = {"parallel__engine": "deepspeed", "deepspeed__zero_stage": 3}
    buffers = []
    for experts in (64, 128):
        config = config_of(8, moe__num_experts=experts, **large, **zero_3)
        job = Job(config, 8, model_units(config), 2, on_gpu=True)
        buffers.append(DeepSpeedCosts(job).held(Moment(Stage.LOSS, 3)).buffers)
    assert buffers[1] - buffers[0] == 2 * 64 * 3 * 4096 * 2048


def test_what_zero_3_offloads_is_in_host_memory() -> None:
    zero_3 = {"parallel__engine": "deepspeed", "deepspeed__zero_stage": 3, "run__device": "cuda"}
    optimizer = zero_3 | {"deepspeed__offload_optimizer": "cpu"}
    both = optimizer | {"deepspeed__offload_parameters": "cpu"}
    stays = predict_memory(config_of(8, **zero_3), 8)
    elements = stays.optimizer // 8
    # fp32 weights, two moments, gradients in two buffers; bf16 weights.
    for settings, host, device in ((zero_3, 0, 6), (optimizer, 20, 2), (both, 22, 0)):
        config = config_of(8, **settings)
        assert zero3_host_memory(config, 8) == host * elements
        assert predict_memory(config, 8).parameters == device * elements


def test_recomputing_more_keeps_less() -> None:
    kept = [
        predict_memory(config_of(8, train__activation_checkpoint=mode, data__seq_len=4096), 8)
        for mode in ("none", "selective", "full")
    ]
    assert kept[0].activations > kept[1].activations > kept[2].activations


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_parts_add_up(engine: str) -> None:
    # The logits are the most that there is, and no gradient is there yet.
    config = config_of(
        8, run__device="cuda", model__vocab_size=50_000, data__seq_len=4096, parallel__engine=engine
    )
    memory = predict_memory(config, 8, device_context=1000)
    parts = {k: v for k, v in asdict(memory).items() if k != "moment"}
    assert memory.total == sum(parts.values())
    assert (memory.moment, memory.gradients) == ("loss", 0)
    assert memory.margin - predict_memory(config, 8, device_context=0).margin == 1000
    assert predict_memory(config_of(8), 8).margin == 0


def test_busier_ranks_hold_more() -> None:
    config = config_of(8, parallel__ep=8, data__seq_len=1024)
    assert predict_memory(config, 8, skew=2.0).tensors > predict_memory(config, 8).tensors


def test_rows_travel_as_the_level_says() -> None:
    copies, rank, node = (
        exchange_rows(
            config_of(8, parallel__ep=8, parallel__ranks_per_node=4, moe__dispatch__level=level),
            num_tokens=1000,
            skew=1.0,
        )
        for level in ("copies", "rank", "node")
    )
    # A token has 4 pairs, each of which is a row of its own at level copies.
    assert copies.pairs == copies.received == copies.outgoing == 4000
    assert copies.sent == 3500
    assert rank.received == node.received < copies.received
    assert node.sent < rank.sent < copies.sent
    assert (copies.relayed, rank.relayed) == (0, 0)
    assert 0 < node.relayed < node.parts


@pytest.mark.parametrize("ep", [1, 8])
def test_short_rows_lie_beside_those_that_they_become(ep: int) -> None:
    """96 values as 112 bytes and as 192, where fp32 has 384."""
    settings = {"parallel__ep": ep, "parallel__ranks_per_node": 8, "data__seq_len": 1024}
    plain, short = (config_of(8, **settings, **more) for more in ({}, SHORT))
    rows = exchange_rows(plain, num_tokens=1024, skew=1.0)
    before, after = (
        block_activations(config, itemsize=4, skew=1.0)["moe"].mlp for config in (plain, short)
    )
    # With one rank the tokens, which are kept as they are, and rounded.
    assert after.kept - before.kept == (384 * 1024 if ep == 1 else 0)
    assert after.left == before.left
    packed = 112 * (1024 + rows.received + rows.sent) - 384 * rows.sent
    sums = (192 - 384) * (rows.outgoing + (rows.received or 1024))
    assert after.widest - before.widest == after.late - before.late == packed + sums


CPU = torch.device("cpu")
SHORT = {"moe__dispatch__row_dtype": "fp8", "moe__dispatch__sum_dtype": "bf16"}
SMALL: dict[str, Any] = {
    "model__vocab_size": 256,
    "model__hidden_size": 128,
    "model__n_heads": 4,
    "moe__router": "balanced",
    "moe__dispatch__exchange": "auto",
    "moe__num_experts": 8,
    "moe__intermediate_size": 64,
    "moe__shared_intermediate_size": 0,
    "data__seq_len": 512,
    "parallel__engine": "single",
}


MLA: dict[str, Any] = {
    "model__attention": "mla",
    "model__n_heads": 8,
    "model__mla__q_lora_rank": 48,
    "model__mla__kv_lora_rank": 64,
    "model__mla__qk_nope_head_dim": 32,
    "model__mla__qk_rope_head_dim": 16,
    "model__mla__v_head_dim": 32,
}


@pytest.mark.parametrize(
    ("dtype", "recomputed", "layers", "others"),
    [
        ("fp32", "none", 2, {}),
        ("bf16", "full", 1, {}),
        ("bf16", "none", 2, MLA),
        ("fp32", "none", 1, {"optim__name": "muon"}),
    ],
)
def test_a_real_step_holds_what_is_predicted(
    dtype: str, recomputed: str, layers: int, others: dict[str, Any]
) -> None:
    settings = {
        **SMALL,
        **others,
        "model__n_layers": layers,
        "train__dtype": dtype,
        "train__activation_checkpoint": recomputed,
    }
    config = config_of(1, **settings)
    predicted, storages = predict_memory(config, 1), LiveStorages()
    tokens = torch.randint(256, (1, 513))
    batches = [Batch(tokens[:, :-1], tokens[:, 1:])]
    with storages:
        engine = SingleEngine(config, None, CPU)
        assert storages.read() == pytest.approx(predicted.parameters, rel=0.001)
        for _ in range(2):
            train_step(engine, batches, lr=1e-3, moe=config.moe, device=CPU, group=None)
        state = predicted.parameters + predicted.optimizer
        assert storages.read() == pytest.approx(state, rel=0.01)
    assert storages.peak[""] == pytest.approx(predicted.tensors, rel=0.05)
