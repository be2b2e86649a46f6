"""Layouts of a job: which are possible, which fit, which is fastest, what would make one fit."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from distmoe.config import Config, ConfigError, ModelConfig, MoEConfig, TrainConfig, check, resolve
from distmoe.config.keys import value_of, with_values
from distmoe.model.attention import attention_sizes
from distmoe.planner.collective_time import Collectives, RankGroup
from distmoe.planner.hardware import Hardware, find_hardware
from distmoe.planner.job_memory import predict_memory
from distmoe.planner.job_stages import job_stages
from distmoe.planner.layouts import FREE, differing, layouts
from distmoe.planner.plan_job import Plan, Planner
from distmoe.planner.remedies import remedies
from distmoe.planner.step_parts import StepPart

GIB = 2**30
CONFIG = Config(
    model=ModelConfig(vocab_size=50304, hidden_size=1024, n_layers=8, n_heads=8, n_kv_heads=4),
    moe=MoEConfig(intermediate_size=512, num_experts=32, top_k=4),
    train=TrainConfig(global_batch_size=64, dtype="bf16"),
)
CONFIG = with_values(CONFIG, {"data.seq_len": 4096, "run.device": "cuda"})
WORLD = 16
# Elements of a block: attention, norms and router; and its experts.
DENSE = 2 * 1024 * 128 * (8 + 4) + 2 * 128 + 2 * 1024 + 32 * 1024
EXPERTS = 32 * 3 * 1024 * 512
# More than half of the layouts fit.
TIGHT = 7


def hardware(memory_gib: float = 80) -> Hardware:
    return find_hardware("h100", memory_gib=memory_gib)


def planned(memory_gib: float, *, pinned: Iterable[str] = (), config: Config = CONFIG) -> Plan:
    planner = Planner(config, WORLD, hardware(memory_gib), skew=1.5)
    return planner.plan(pinned=set(pinned), top=5)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned(TIGHT)


def test_every_layout_is_possible_and_no_two_are_the_same() -> None:
    found = list(layouts(CONFIG, WORLD, ranks_per_node=8, pinned=()))
    assert len({tuple(value_of(one, key) for key in FREE) for one in found}) == len(found) > 100
    for one in found[::7]:
        check(one, WORLD, with_data=False)
    assert {one.parallel.engine for one in found} == {"fsdp2", "deepspeed"}
    assert {one.parallel.ep for one in found} == {1, 2, 4, 8, 16}
    assert {one.train.micro_batch_size for one in found} == {1, 2, 4}
    (alone,) = {one.parallel.engine for one in layouts(CONFIG, 1, ranks_per_node=1, pinned=())}
    assert alone == "single"


@pytest.mark.parametrize(
    ("settings", "stages"),
    [
        ({}, {1, 2, 3}),
        ({"train.compile": "dense"}, {1, 2}),
        ({"deepspeed.offload_optimizer": "cpu", "deepspeed.offload_parameters": "cpu"}, {3}),
    ],
)
def test_zero_stages_are_those_that_a_run_allows(settings: Any, stages: set[int]) -> None:
    given = with_values(CONFIG, settings | {"parallel.engine": "deepspeed", "parallel.ep": 4})
    pinned = {*settings, "parallel.engine", "parallel.ep"}
    found = list(layouts(given, WORLD, ranks_per_node=8, pinned=pinned))
    assert {one.deepspeed.zero_stage for one in found} == stages
    for one in found:
        check(one, WORLD, with_data=False)


def test_given_settings_stay() -> None:
    given = with_values(CONFIG, {"parallel.ep": 4, "parallel.dp_shard": 8})
    pinned = {"parallel.ep", "parallel.dp_shard", "train.activation_checkpoint"}
    found = list(layouts(given, WORLD, ranks_per_node=8, pinned=pinned))
    assert found
    for one in found:
        parallel = one.parallel
        assert (parallel.ep, parallel.dp_shard, parallel.dp_replicate) == (4, 8, 2)
        assert one.train.activation_checkpoint == "none"


def test_the_ranking_is_of_all_that_fit(plan: Plan) -> None:
    every = list(layouts(CONFIG, WORLD, ranks_per_node=8, pinned=()))
    assert plan.tried == len(every) > plan.fitting > 0
    times = [one.time.seconds for one in plan.best]
    assert times == sorted(times)
    assert len(times) == 5
    planner = Planner(CONFIG, WORLD, hardware(TIGHT), skew=1.5)
    for one in every[::7]:
        layout = planner.layout(one)
        if layout.memory.total <= TIGHT * GIB:
            assert layout.time.seconds >= times[0]


def test_parts_add_up_and_nothing_is_faster_than_its_peak(plan: Plan) -> None:
    for layout in plan.best:
        time = layout.time
        assert sum(time.parts_s.values()) == pytest.approx(time.seconds)
        assert set(time.parts_s) == set(StepPart)
        assert time.mfu is not None
        assert 0.05 < time.mfu < 0.7
        tokens = CONFIG.train.global_batch_size * CONFIG.data.seq_len
        assert time.tokens_per_s_per_rank == tokens / time.seconds / WORLD


def test_what_does_not_fit_says_what_would(plan: Plan) -> None:
    assert plan.misfits
    for misfit in plan.misfits:
        assert misfit.layout.memory.total > TIGHT * GIB
        assert misfit.layout.time.seconds < plan.best[0].time.seconds
        changed = with_values(misfit.layout.config, misfit.changes)
        check(changed, WORLD, with_data=False)
        assert predict_memory(changed, WORLD).total < TIGHT * GIB
        assert misfit.changed is not None
        assert not differing(misfit.changed.config, changed)
        assert misfit.changed.memory.total < TIGHT * GIB
        assert misfit.changed.time.seconds >= plan.best[0].time.seconds
        others = [differing(misfit.layout.config, one) for one in _fitting(TIGHT)]
        assert _number(misfit.changes) == min(map(_number, others)) > 0


def _fitting(memory_gib: float) -> list[Config]:
    every = layouts(CONFIG, WORLD, ranks_per_node=8, pinned=())
    return [one for one in every if predict_memory(one, WORLD).total < memory_gib * GIB]


def _number(changes: dict[str, Any]) -> int:
    """dp_shard follows from dp_replicate."""
    return len(changes.keys() - {"parallel.dp_shard"})


def test_layouts_that_do_not_fit_are_shown_if_that_is_a_loss(plan: Plan) -> None:
    every = Planner(CONFIG, WORLD, hardware(TIGHT), skew=1.5).plan(pinned=(), top=1, misfits=99)
    assert 3 < len(every.misfits) < plan.tried - plan.fitting
    assert all(m.layout.time.seconds < every.best[0].time.seconds for m in every.misfits)
    cut = ("parallel.ep", "train.micro_batch_size", "train.activation_checkpoint")
    kinds = [
        tuple(value_of(m.layout.config, key) for key in ("parallel.engine", *cut))
        for m in every.misfits
    ]
    assert len(set(kinds)) == len(kinds)


def test_where_nothing_fits_more_ranks_or_host_memory_do() -> None:
    config = with_values(CONFIG, {"train.global_batch_size": 1024})
    never = remedies(Planner(config, WORLD, hardware(0.1), skew=1.5), {"parallel.engine"})
    assert [remedy.world for remedy in never] == [16, 32, 64, 128, 256]
    assert not any(remedy.fits for remedy in never)
    # Enough for 64 ranks, not for 32.
    enough = (never[1].bytes + never[2].bytes) / 2 / GIB
    planner = Planner(config, WORLD, hardware(enough), skew=1.5)
    plan = planner.plan(pinned=set(), top=3)
    assert not plan.best
    assert plan.fitting == 0
    assert all(not misfit.changes and misfit.changed is None for misfit in plan.misfits)
    found = remedies(planner, set())
    assert [(one.world, one.fits) for one in found[2:]] == [(32, False), (64, True)]
    assert found[1].values["deepspeed.offload_optimizer"] == "cpu"
    spread = with_values(config, {"parallel.ep": 16, "model.vocab_size": 512} | found[0].values)
    pinned = {"parallel.ep", *found[0].values}
    skewed = Planner(spread, WORLD, hardware(enough), skew=3.0)
    layout = min(
        (skewed.layout(one) for one in layouts(spread, WORLD, ranks_per_node=8, pinned=pinned)),
        key=lambda layout: layout.memory.total,
    )
    # With the rows of the busiest rank, as layouts of the plan have them.
    assert remedies(skewed, {"parallel.ep"})[0].bytes == layout.memory.total
    # An engine that was given cannot be another.
    assert remedies(planner, {"parallel.engine"}) == [found[0], *found[2:]]


def test_the_files_own_layout_is_there_or_why_it_is_not(plan: Plan) -> None:
    assert plan.as_written is not None
    assert not differing(plan.as_written.config, CONFIG, ("parallel.ep", "parallel.dp_replicate"))
    odd = planned(TIGHT, config=with_values(CONFIG, {"parallel.ep": 3}))
    assert odd.as_written is None
    assert any("num_experts is 32; it must be a multiple" in text for text in odd.impossible)
    assert odd.best


def test_given_dispatch_is_kept() -> None:
    given = with_values(CONFIG, {"moe.dispatch.level": "copies", "parallel.ep": 8})
    plan = planned(80, pinned={"moe.dispatch.level", "parallel.ep"}, config=given)
    assert {layout.config.moe.dispatch.level for layout in plan.best} == {"copies"}
    free = planned(80, pinned={"parallel.ep"}, config=given)
    best = free.best[0]
    assert best.config.moe.dispatch.level == "rank"
    assert best.time.seconds < plan.best[0].time.seconds
    # Not that of the file, whose copies need more.
    planner = Planner(CONFIG, WORLD, hardware(), skew=1.5)
    assert best.memory == planner.layout(best.config).memory
    assert best.memory.total < plan.best[0].memory.total


def test_gpus_relay_only_if_they_are_told_to() -> None:
    """Over two nodes, where a row to a node is the fastest."""

    def level(**settings: str) -> str:
        values = {key.replace("__", "."): value for key, value in settings.items()}
        config = with_values(CONFIG, {"parallel.ep": 16, "train.dtype": "bf16"} | values)
        planner = Planner(config, WORLD, hardware(), skew=1.5)
        return planner.layout(config).config.moe.dispatch.level

    assert level() == "rank"
    assert level(run__device="cpu") == "node"
    assert level(moe__dispatch__level="node") == "node"


def test_an_engine_that_no_plan_knows_is_named() -> None:
    config = with_values(CONFIG, {"parallel.engine": "plain"})
    with pytest.raises(ConfigError, match=r"parallel.engine is 'plain'; .* knows single, fsdp2, d"):
        Planner(config, WORLD, hardware(), skew=1.5)


def test_a_model_without_experts() -> None:
    dense = replace(CONFIG, model=replace(CONFIG.model, n_dense_layers=8))
    best = planned(80, config=dense).best[0]
    assert best.config.parallel.ep == 1
    assert best.time.parts_s[StepPart.EXPERTS] == best.time.parts_s[StepPart.EXCHANGE] == 0


def seconds_of(**settings: object) -> float:
    values = {key.replace("__", "."): value for key, value in settings.items()}
    planner = Planner(CONFIG, WORLD, hardware(), skew=1.5)
    return planner.layout(with_values(CONFIG, values)).time.seconds


def test_what_costs_time() -> None:
    plain = seconds_of()
    assert seconds_of(train__activation_checkpoint="full") > plain
    assert seconds_of(train__micro_batch_size=1) > plain
    assert seconds_of(moe__dispatch__overlap=False, parallel__ep=8) > seconds_of(parallel__ep=8)
    zero = {"parallel__engine": "deepspeed", "deepspeed__zero_stage": 2}
    assert seconds_of(**zero) > seconds_of(**zero, deepspeed__overlap_comm=True)
    # Stage 1 reduces once a step.
    small = {"train__micro_batch_size": 1, "parallel__engine": "deepspeed"}
    assert seconds_of(**small, deepspeed__zero_stage=1) < seconds_of(
        **small, deepspeed__zero_stage=2
    )


def test_stages_carry_the_traffic_of_the_engine() -> None:
    def stages(**values: object) -> tuple[float, float, float, float]:
        config = with_values(CONFIG, {k.replace("__", "."): v for k, v in values.items()})
        found = next(
            one
            for one in layouts(config, WORLD, ranks_per_node=8, pinned=FREE)
            if one.parallel.dp_replicate == 1
        )
        jobs = job_stages(found, hardware(), dtype="bf16")
        block = jobs.stages[-2]
        seconds = (block.gather, block.gather_again, block.reduce)
        return (*(one.seconds for one in seconds), jobs.once_s)

    engine = {"parallel__engine": "fsdp2", "parallel__dp_shard": 16, "train__micro_batch_size": 1}
    gather, again, reduce, once = stages(**engine)
    links, group = Collectives(hardware().profile, 8), RankGroup(16, 8)

    def sent(itemsize: int) -> float:
        parts = (links.gather(group, itemsize * size) for size in (DENSE, EXPERTS))
        return sum(part.seconds for part in parts)

    assert gather == again == pytest.approx(sent(2))
    assert reduce == pytest.approx(sent(4))
    assert once == 0
    kept = stages(**engine, parallel__reshard_after_forward=False)
    assert kept == (gather, 0, reduce, 0)
    assert stages(**engine, parallel__reduce_gradients="step") == (gather, again, reduce, 0)
    zero = engine | {"parallel__engine": "deepspeed"}
    assert stages(**zero, deepspeed__zero_stage=3) == (gather, again, reduce, 0)
    late = stages(**zero, deepspeed__zero_stage=1)
    assert late[:3] == (0, 0, 0)
    # Seven blocks with experts, one without, embedding and head.
    assert late[3] > 7 * (gather + reduce)


def test_keys_and_values_of_shared_sequences_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block waits for those of all positions, and backward for the gradients."""
    settings = {
        "parallel.cp": 4,
        "parallel.engine": "fsdp2",
        "train.micro_batch_size": 4,
        "train.activation_checkpoint": "selective",
    }
    config = resolve(with_values(CONFIG, settings), WORLD)
    jobs = job_stages(config, hardware(), dtype="bf16")
    waited = jobs.parts_s[StepPart.CONTEXT]
    links, group = Collectives(hardware().profile, 8), RankGroup(4, 4)
    num_bytes = 2 * (4 * 4096) * 2 * (4 * 128)
    gather_s = links.gather(group, num_bytes).seconds
    backward_s = gather_s + links.all_to_all(group, num_bytes).seconds
    assert waited == pytest.approx(8 * (gather_s + backward_s))
    with monkeypatch.context() as patch:
        nothing = replace(attention_sizes(config.model), gathered=0)
        patch.setattr("distmoe.planner.job_stages.attention_sizes", lambda model: nothing)
        free = job_stages(config, hardware(), dtype="bf16")
    for stage, other in zip(jobs.stages[1:-1], free.stages[1:-1], strict=True):
        assert stage.forward_s - other.forward_s == pytest.approx(gather_s)
        assert stage.backward_s - other.backward_s == pytest.approx(backward_s)
    found = Planner(CONFIG, WORLD, hardware(), skew=1.5).layout(with_values(CONFIG, settings))
    assert found.time.parts_s[StepPart.CONTEXT] == pytest.approx(4 * waited)
    assert sum(found.time.parts_s.values()) == pytest.approx(found.time.seconds)


def test_a_long_sequence_fits_if_it_is_shared() -> None:
    long = with_values(CONFIG, {"data.seq_len": 1 << 18, "train.global_batch_size": 4})
    assert not planned(80, config=long).best
    shared = with_values(long, {"parallel.cp": 8})
    found = layouts(shared, WORLD, ranks_per_node=8, pinned=())
    assert {one.train.micro_batch_size for one in found} == {1, 2}
    plan = planned(80, config=shared)
    assert plan.best
    assert {layout.config.parallel.cp for layout in plan.best} == {8}


def of_micro_batches(**settings: object) -> list[tuple[int, float, float]]:
    """Of a block with experts, in four micro-batches: how many gather and reduce so long."""
    values = {"parallel.engine": "fsdp2", "parallel.dp_shard": 16, "train.micro_batch_size": 1}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    config = resolve(with_values(CONFIG, values), WORLD)
    kinds = job_stages(config, hardware(), dtype="bf16").micro_batches
    return [(n, kind[-2].gather.seconds, kind[-2].reduce.seconds) for kind, n in kinds.items()]


def test_the_first_micro_batch_gathers_and_the_last_reduces() -> None:
    ((number, gather, reduce),) = of_micro_batches()
    assert number == 4
    assert min(gather, reduce) > 0
    kept = of_micro_batches(parallel__reshard_after_forward=False)
    assert kept == [(1, gather, reduce), (3, 0, reduce)]
    late = of_micro_batches(parallel__reduce_gradients="step")
    assert late == [(3, gather, 0), (1, gather, reduce)]
    inside, over_nodes = of_micro_batches(parallel__dp_shard=8, parallel__dp_replicate=2)
    assert (inside[0], over_nodes[0]) == (3, 1)
    assert over_nodes[2] > inside[2] > 0


def test_replicas_reduce_their_shards_once_more() -> None:
    axes = {"parallel.dp_shard": 8, "parallel.dp_replicate": 2, "train.micro_batch_size": 1}
    config = with_values(CONFIG, axes)
    (found,) = layouts(config, WORLD, ranks_per_node=8, pinned=FREE)
    links, size = Collectives(hardware().profile, 8), DENSE + EXPERTS
    inside = sum(links.reduce(RankGroup(8, 8), 4 * part).seconds for part in (DENSE, EXPERTS))
    over_nodes = links.all_reduce(RankGroup(2, 1), 4 * size / 8).seconds
    block = job_stages(resolve(found, WORLD), hardware(), dtype="bf16").stages[-2]
    assert block.reduce.seconds == pytest.approx(inside + over_nodes)
