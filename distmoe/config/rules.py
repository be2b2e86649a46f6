"""Relations between settings. A rule yields `key is VALUE; what is allowed` where one is broken."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from distmoe.config.expert_groups import expert_group_problems
from distmoe.config.keys import value_of
from distmoe.config.profiling_rules import profiling_problems
from distmoe.config.schema import Config
from distmoe.registry import EXCHANGES, GATED_ACTIVATIONS

# Of scores and biases, for decisions: 2^-24.
KEY_UNIT = 1 / (1 << 24)

# Routers that ignore scores and bias, by name, as a check loads no router.
FORCED_ROUTERS = ("balanced", "hash")

Complaints = Callable[[Config, int], Iterator[str]]


@dataclass(frozen=True)
class Rule:
    """Complaints about a resolved config and a number of ranks, if the ranges of ``keys`` hold.
    ``of_layer``: an MoE layer by itself must follow it, too; it reads only moe and parallel.ep and
    ranks_per_node."""

    keys: tuple[str, ...]
    complaints: Complaints
    of_layer: bool = False


RULES: list[Rule] = []


def _rule(*keys: str, of_layer: bool = False) -> Callable[[Complaints], Complaints]:
    def add(complaints: Complaints) -> Complaints:
        RULES.append(Rule(keys, complaints, of_layer))
        return complaints

    return add


def _wrong(config: Config, key: str, allowed: str) -> str:
    return f"{key} is {value_of(config, key)}; it must {allowed}"


@_rule()
def _run_folder(config: Config, world: int) -> Iterator[str]:
    if Path(config.run.dir).exists() and not Path(config.run.dir).is_dir():
        yield _wrong(config, "run.dir", "be a folder, and there is a file of that name")
    elif (obstacle := _obstacle(Path(config.run.dir))) is not None:
        yield _wrong(config, "run.dir", f"be a folder that can be written, and {obstacle} cannot")


@_rule("train.record_routing")
def _routing_folder(config: Config, world: int) -> Iterator[str]:
    if config.train.record_routing:
        folder = Path(config.run.dir) / "routing"
        if (obstacle := _obstacle(folder)) is not None:
            yield _wrong(
                config,
                "train.record_routing",
                f"be 0, or {folder} a folder that can be written: {obstacle} cannot",
            )


def _obstacle(folder: Path) -> Path | None:
    """What keeps files from being written into ``folder``: itself or the first above it that
    exists."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    can_be_written = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return None if can_be_written else nearest


@_rule("model.hidden_size", "model.n_heads", "model.head_dim")
def _heads(config: Config, world: int) -> Iterator[str]:
    if config.model.head_dim == 0:
        hidden = f"model.hidden_size ({config.model.hidden_size})"
        yield _wrong(config, "model.n_heads", f"divide {hidden}, unless model.head_dim is set")
    elif config.model.head_dim % 2:
        yield _wrong(config, "model.head_dim", "be even, as RoPE turns pairs")
    elif config.model.head_dim < 16 and config.data.document_mask and config.run.device == "cuda":
        # FlexAttention, which masks documents on a GPU, has no smaller one.
        yield _wrong(config, "model.head_dim", "be at least 16 with data.document_mask on a GPU")


@_rule("model.n_heads", "model.n_kv_heads")
def _kv_heads(config: Config, world: int) -> Iterator[str]:
    if config.model.n_heads % config.model.n_kv_heads:
        heads = f"model.n_heads ({config.model.n_heads})"
        yield _wrong(config, "model.n_kv_heads", f"divide {heads}")


@_rule("model.n_layers", "model.n_dense_layers")
def _dense_layers(config: Config, world: int) -> Iterator[str]:
    if config.model.n_dense_layers > config.model.n_layers:
        layers = f"0..model.n_layers ({config.model.n_layers})"
        yield _wrong(config, "model.n_dense_layers", f"be in {layers}")


@_rule("model.hidden_size", "moe.hidden_size")
def _moe_hidden_size(config: Config, world: int) -> Iterator[str]:
    if config.moe.hidden_size != config.model.hidden_size:
        hidden = f"model.hidden_size ({config.model.hidden_size})"
        yield _wrong(config, "moe.hidden_size", f"be 0 or {hidden}")


@_rule("moe.num_experts", "moe.top_k", of_layer=True)
def _top_k(config: Config, world: int) -> Iterator[str]:
    if config.moe.top_k > config.moe.num_experts:
        yield _wrong(config, "moe.top_k", f"be in 1..moe.num_experts ({config.moe.num_experts})")


@_rule(of_layer=True)
def _renormalize(config: Config, world: int) -> Iterator[str]:
    if config.moe.router == "topk_softmax" and config.moe.renormalize != "topk":
        yield _wrong(config, "moe.renormalize", "be topk with moe.router 'topk_softmax'")


@_rule("moe.bias_update_rate", of_layer=True)
def _bias_update_rate(config: Config, world: int) -> Iterator[str]:
    if 0 < config.moe.bias_update_rate < KEY_UNIT:
        yield _wrong(
            config, "moe.bias_update_rate", f"be 0 or at least {KEY_UNIT}, the unit of a bias"
        )
    elif config.moe.bias_update_rate > 0 and config.moe.router in FORCED_ROUTERS:
        router = f"moe.router '{config.moe.router}'"
        yield _wrong(
            config, "moe.bias_update_rate", f"be 0 with {router}, whose choice follows no bias"
        )


@_rule(
    "moe.num_experts",
    "moe.top_k",
    "moe.expert_groups",
    "moe.groups_per_token",
    "moe.nodes_per_token",
    "parallel.ep",
    "parallel.ranks_per_node",
    of_layer=True,
)
def _expert_groups(config: Config, world: int) -> Iterator[str]:
    parallel = config.parallel
    # Experts that the ranks cannot share are the complaint of another rule.
    if config.moe.num_experts % parallel.ep == 0:
        yield from expert_group_problems(
            config.moe, ep=parallel.ep, ranks_per_node=parallel.ranks_per_node
        )


@_rule("parallel.ep", "parallel.ranks_per_node")
def _node_level(config: Config, world: int) -> Iterator[str]:
    ep, per_node = config.parallel.ep, config.parallel.ranks_per_node
    if config.moe.dispatch.level == "node" and 0 < per_node < ep and ep % per_node:
        yield _wrong(
            config,
            "parallel.ranks_per_node",
            f"divide parallel.ep ({ep}) with moe.dispatch.level 'node'",
        )


@_rule("moe.num_experts", "parallel.ep", of_layer=True)
def _experts_per_rank(config: Config, world: int) -> Iterator[str]:
    if config.moe.num_experts % config.parallel.ep:
        yield _wrong(
            config, "moe.num_experts", f"be a multiple of parallel.ep ({config.parallel.ep})"
        )


@_rule("moe.num_experts", "moe.rounding.balance_groups", of_layer=True)
def _balance_groups(config: Config, world: int) -> Iterator[str]:
    groups = config.moe.rounding.balance_groups
    if groups and config.moe.num_experts % groups:
        experts = f"moe.num_experts ({config.moe.num_experts})"
        yield _wrong(config, "moe.rounding.balance_groups", f"be 0 or divide {experts}")


@_rule("moe.rounding.capacity_factor", of_layer=True)
def _capacity_factor(config: Config, world: int) -> Iterator[str]:
    if 0 < config.moe.rounding.capacity_factor < 1:
        yield _wrong(
            config,
            "moe.rounding.capacity_factor",
            "be 0 for no bound, or at least 1: below, even experts of equal load lose pairs",
        )


@_rule("moe.rounding.tile", "train.micro_batch_size", "data.seq_len", "parallel.ep")
def _tile(config: Config, world: int) -> Iterator[str]:
    tokens = config.train.micro_batch_size * config.data.seq_len
    whose, product = "a rank's", "train.micro_batch_size * data.seq_len"
    if config.moe.rounding.scope == "ep":
        tokens *= config.parallel.ep
        whose, product = "an expert-parallel group's", f"{product} * parallel.ep"
    rounds = config.moe.rounding.rule != "none"
    # Without a micro-batch there is another complaint, and no number of tokens.
    if rounds and config.train.micro_batch_size and config.moe.rounding.tile > tokens:
        yield _wrong(
            config,
            "moe.rounding.tile",
            f"be at most the tokens of {whose} micro-batch, {product} ({tokens})",
        )


@_rule("parallel.ep", of_layer=True)
def _local_exchange(config: Config, world: int) -> Iterator[str]:
    if config.moe.dispatch.exchange == "local" and config.parallel.ep > 1:
        others = ", ".join(name for name in EXCHANGES if name != "local")
        ranks = f"parallel.ep ({config.parallel.ep})"
        yield _wrong(config, "moe.dispatch.exchange", f"be auto or one of {others} with {ranks}")


@_rule("parallel.ep", "moe.dispatch.steps")
def _steps_by_source(config: Config, world: int) -> Iterator[str]:
    peers = max(1, config.parallel.ep - 1)
    dispatch = config.moe.dispatch
    # Level node has an order of its own.
    if dispatch.order == "source" and dispatch.level != "node" and dispatch.steps > peers:
        yield _wrong(
            config,
            "moe.dispatch.steps",
            f"be at most {peers} with moe.dispatch.order source and parallel.ep "
            f"{config.parallel.ep}",
        )


@_rule()
def _profile(config: Config, world: int) -> Iterator[str]:
    if config.parallel.profile and not Path(config.parallel.profile).is_file():
        yield _wrong(
            config,
            "parallel.profile",
            "be empty or a file that `distmoe doctor comm --save` wrote",
        )


@_rule()
def _tiles(config: Config, world: int) -> Iterator[str]:
    tiles = config.moe.kernel_tiles
    if tiles not in ("auto", "default") and not Path(tiles).is_file():
        yield _wrong(
            config,
            "moe.kernel_tiles",
            "be auto, default or a file that `tools/bench_moe.py --write-tiles` wrote",
        )


@_rule("parallel.dp_replicate", "parallel.dp_shard")
def _world(config: Config, world: int) -> Iterator[str]:
    parallel = config.parallel
    if world % parallel.dp_replicate:
        yield _wrong(config, "parallel.dp_replicate", f"divide the number of ranks ({world})")
    elif parallel.dp_replicate * parallel.dp_shard != world:
        shards = world // parallel.dp_replicate
        yield _wrong(
            config,
            "parallel.dp_shard",
            f"be 0 or {shards}, the ranks ({world}) / parallel.dp_replicate "
            f"({parallel.dp_replicate})",
        )


@_rule("parallel.dp_replicate", "parallel.dp_shard", "parallel.ep")
def _ep(config: Config, world: int) -> Iterator[str]:
    parallel = config.parallel
    # An unset dp_shard is the complaint of another rule.
    if parallel.dp_shard % parallel.ep:
        yield _wrong(
            config,
            "parallel.ep",
            f"divide parallel.dp_shard ({parallel.dp_shard}; the number of ranks is {world})",
        )


@_rule()
def _single(config: Config, world: int) -> Iterator[str]:
    if config.parallel.engine == "single" and world > 1:
        yield _wrong(config, "parallel.engine", f"be auto, fsdp2 or deepspeed for {world} ranks")


@_rule(
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
        yield _wrong(
            config,
            "moe.num_experts",
            f"be a multiple of parallel.dp_shard ({parallel.dp_shard}), or model.hidden_size "
            f"({config.model.hidden_size}) and {gate}moe.intermediate_size ({width}) multiples of "
            f"dp_shard / ep ({efsdp})",
        )


@_rule("parallel.dp_replicate", "deepspeed.zero_stage")
def _deepspeed(config: Config, world: int) -> Iterator[str]:
    if config.parallel.engine != "deepspeed":
        return
    stage = config.deepspeed.zero_stage
    if stage == 0:
        yield _wrong(
            config,
            "deepspeed.zero_stage",
            "be 1, 2 or 3: without ZeRO, DeepSpeed clips by a norm that is wrong for experts",
        )
    if config.parallel.dp_replicate > 1:
        yield _wrong(
            config,
            "parallel.dp_replicate",
            "be 1 with parallel.engine 'deepspeed', which shards over all ranks",
        )
    if config.deepspeed.offload_parameters != "none" and stage != 3:
        yield _wrong(
            config,
            "deepspeed.offload_parameters",
            f"be none with deepspeed.zero_stage {stage}, which keeps whole parameters",
        )


@_rule("deepspeed.zero_stage")
def _compile(config: Config, world: int) -> Iterator[str]:
    by_hooks = config.parallel.engine == "deepspeed" and config.deepspeed.zero_stage == 3
    if config.train.compile != "none" and by_hooks:
        yield _wrong(
            config,
            "train.compile",
            "be none with deepspeed.zero_stage 3, whose hooks gather and free parameters inside of "
            "what would be compiled",
        )


@_rule("train.global_batch_size", "train.micro_batch_size")
def _global_batch(config: Config, world: int) -> Iterator[str]:
    train = config.train
    if train.micro_batch_size == 0:
        yield _wrong(
            config, "train.global_batch_size", f"be a multiple of the number of ranks ({world})"
        )
    elif train.global_batch_size % (world * train.micro_batch_size):
        yield _wrong(
            config,
            "train.global_batch_size",
            f"be a multiple of {world * train.micro_batch_size}, the ranks ({world}) * "
            f"train.micro_batch_size ({train.micro_batch_size})",
        )


@_rule("train.steps", "optim.warmup_steps")
def _warmup(config: Config, world: int) -> Iterator[str]:
    if config.optim.warmup_steps > config.train.steps:
        yield _wrong(config, "optim.warmup_steps", f"be at most train.steps ({config.train.steps})")


@_rule("train.steps", "optim.warmup_steps", "optim.decay_steps")
def _decay(config: Config, world: int) -> Iterator[str]:
    left = config.train.steps - config.optim.warmup_steps
    if config.optim.schedule == "wsd" and config.optim.decay_steps > left >= 0:
        yield _wrong(
            config,
            "optim.decay_steps",
            f"be at most the steps after the warm-up, train.steps - optim.warmup_steps ({left})",
        )


@_rule("train.steps")
def _profiling(config: Config, world: int) -> Iterator[str]:
    yield from profiling_problems(config, world)


@_rule()
def _wandb(config: Config, world: int) -> Iterator[str]:
    project = config.metrics.wandb
    if not project:
        return
    if not project.isprintable() or set(project) & set("/\\#?%:"):
        yield _wrong(config, "metrics.wandb", "be empty or a name without any of / \\ # ? % :")
    package = find_spec("wandb")
    # A folder wandb/ of runs, in the working folder, would pass for a package without files.
    if package is None or package.origin is None:
        yield _wrong(config, "metrics.wandb", "be empty where wandb is missing: pip install wandb")


@_rule()
def _resume(config: Config, world: int) -> Iterator[str]:
    resume = config.checkpoint.resume
    if resume not in ("auto", "never") and not Path(resume, "manifest.json").is_file():
        allowed = "be auto, never or the folder of a complete checkpoint, which has a manifest.json"
        yield _wrong(config, "checkpoint.resume", allowed + _newest_in(resume))


@_rule()
def _init_from(config: Config, world: int) -> Iterator[str]:
    source = config.checkpoint.init_from
    if source and not Path(source, "manifest.json").is_file():
        allowed = "be empty or the folder of a complete checkpoint, which has a manifest.json"
        yield _wrong(config, "checkpoint.init_from", allowed + _newest_in(source))


def _newest_in(run: str) -> str:
    """The checkpoint that is meant, where a run was named."""
    found = sorted(Path(run).glob("checkpoints/step-*/manifest.json"))
    return f"; the newest there is {found[-1].parent}" if found else ""
