"""Ranks, engines and steps."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config.batch import data_ranks
from distmoe.config.keys import value_of
from distmoe.config.profiling_rules import profiling_problems
from distmoe.config.rule import Rule, adder_to, wrong
from distmoe.config.schema import Config
from distmoe.registry import GATED_ACTIVATIONS

RULES: list[Rule] = []
rule = adder_to(RULES)


@rule("parallel.dp_replicate", "parallel.dp_shard")
def _world(config: Config, world: int) -> Iterator[str]:
    parallel = config.parallel
    if world % parallel.dp_replicate:
        yield wrong(config, "parallel.dp_replicate", f"divide the number of ranks ({world})")
    elif parallel.dp_replicate * parallel.dp_shard != world:
        shards = world // parallel.dp_replicate
        yield wrong(
            config,
            "parallel.dp_shard",
            f"be 0 or {shards}, the ranks ({world}) / parallel.dp_replicate "
            f"({parallel.dp_replicate})",
        )


@rule("parallel.dp_replicate", "parallel.dp_shard", "parallel.ep")
def _ep(config: Config, world: int) -> Iterator[str]:
    return _divides_shards(config, "parallel.ep", world)


@rule("parallel.dp_replicate", "parallel.dp_shard", "parallel.cp")
def _cp(config: Config, world: int) -> Iterator[str]:
    return _divides_shards(config, "parallel.cp", world)


def _divides_shards(config: Config, key: str, world: int) -> Iterator[str]:
    shards = config.parallel.dp_shard
    # An unset dp_shard is the complaint of another rule.
    if shards % value_of(config, key):
        allowed = f"divide parallel.dp_shard ({shards}; the number of ranks is {world})"
        yield wrong(config, key, allowed)


@rule("parallel.cp", "data.seq_len")
def _chunks(config: Config, world: int) -> Iterator[str]:
    """Two for each rank that shares a sequence."""
    chunks = 2 * config.parallel.cp
    if config.parallel.cp > 1 and config.data.seq_len % chunks:
        yield wrong(config, "data.seq_len", f"be a multiple of 2 * parallel.cp ({chunks})")


@rule()
def _single(config: Config, world: int) -> Iterator[str]:
    if config.parallel.engine == "single" and world > 1:
        yield wrong(config, "parallel.engine", f"be auto, fsdp2 or deepspeed for {world} ranks")


@rule(
    "parallel.dp_replicate",
    "parallel.dp_shard",
    "parallel.ep",
    "moe.num_experts",
    "moe.intermediate_size",
    "model.hidden_size",
)
def _expert_shards(config: Config, world: int) -> Iterator[str]:
    """FSDP-2 cuts expert weights along the experts, or else along the rows of each matrix."""
    moe, parallel = config.moe, config.parallel
    axes_fit = parallel.dp_replicate * parallel.dp_shard == world
    if parallel.engine != "fsdp2" or not axes_fit or parallel.dp_shard % parallel.ep:
        return
    efsdp = parallel.dp_shard // parallel.ep
    by_expert = moe.num_experts % (parallel.ep * efsdp) == 0
    gate = "2 * " if GATED_ACTIVATIONS[moe.activation] else ""
    width = moe.intermediate_size * (2 if gate else 1)
    by_row = config.model.hidden_size % efsdp == 0 and width % efsdp == 0
    if not by_expert and not by_row:
        yield wrong(
            config,
            "moe.num_experts",
            f"be a multiple of parallel.dp_shard ({parallel.dp_shard}), or model.hidden_size "
            f"({config.model.hidden_size}) and {gate}moe.intermediate_size ({width}) multiples of "
            f"dp_shard / ep ({efsdp})",
        )


@rule("parallel.dp_replicate", "deepspeed.zero_stage")
def _deepspeed(config: Config, world: int) -> Iterator[str]:
    if config.parallel.engine != "deepspeed":
        return
    stage = config.deepspeed.zero_stage
    if stage == 0:
        yield wrong(
            config,
            "deepspeed.zero_stage",
            "be 1, 2 or 3: without ZeRO, DeepSpeed clips by a norm that is wrong for experts",
        )
    if config.parallel.dp_replicate > 1:
        yield wrong(
            config,
            "parallel.dp_replicate",
            "be 1 with parallel.engine 'deepspeed', which shards over all ranks",
        )
    if config.deepspeed.offload_parameters != "none" and stage != 3:
        yield wrong(
            config,
            "deepspeed.offload_parameters",
            f"be none with deepspeed.zero_stage {stage}, which keeps whole parameters",
        )
    if config.optim.name != "adamw":
        yield wrong(
            config,
            "optim.name",
            "be adamw with parallel.engine 'deepspeed', which shards without regard to matrices",
        )


@rule("deepspeed.zero_stage")
def _compile(config: Config, world: int) -> Iterator[str]:
    by_hooks = config.parallel.engine == "deepspeed" and config.deepspeed.zero_stage == 3
    if config.train.compile != "none" and by_hooks:
        yield wrong(
            config,
            "train.compile",
            "be none with deepspeed.zero_stage 3, whose hooks gather and free parameters inside of "
            "what would be compiled",
        )


@rule("train.global_batch_size", "train.micro_batch_size", "parallel.cp")
def _global_batch(config: Config, world: int) -> Iterator[str]:
    train, cp = config.train, config.parallel.cp
    if world % cp:
        # A cp axis that the ranks do not fill is the complaint of another rule.
        return
    shared = f" / parallel.cp ({cp})" if cp > 1 else ""
    if train.micro_batch_size == 0:
        allowed = f"be a multiple of the number of ranks ({world}){shared}"
        yield wrong(config, "train.global_batch_size", allowed)
    elif train.global_batch_size % (together := data_ranks(config, world) * train.micro_batch_size):
        yield wrong(
            config,
            "train.global_batch_size",
            f"be a multiple of {together}, the ranks ({world}){shared} * "
            f"train.micro_batch_size ({train.micro_batch_size})",
        )


@rule("train.steps", "optim.warmup_steps")
def _warmup(config: Config, world: int) -> Iterator[str]:
    if config.optim.warmup_steps > config.train.steps:
        yield wrong(config, "optim.warmup_steps", f"be at most train.steps ({config.train.steps})")


@rule("train.steps", "optim.warmup_steps", "optim.decay_steps")
def _decay(config: Config, world: int) -> Iterator[str]:
    left = config.train.steps - config.optim.warmup_steps
    if config.optim.schedule == "wsd" and config.optim.decay_steps > left >= 0:
        yield wrong(
            config,
            "optim.decay_steps",
            f"be at most the steps after the warm-up, train.steps - optim.warmup_steps ({left})",
        )


@rule("train.steps")
def _profiling(config: Config, world: int) -> Iterator[str]:
    yield from profiling_problems(config, world)
