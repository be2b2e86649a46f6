"""The model and its MoE layers: sizes, routers, rounding, the exchange of rows."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config.batch import rank_tokens
from distmoe.config.expert_groups import expert_group_problems
from distmoe.config.rule import Rule, adder_to, wrong
from distmoe.config.schema import Config
from distmoe.registry import EXCHANGES

# Of scores and biases, for decisions: 2^-24.
KEY_UNIT = 1 / (1 << 24)

# Routers that ignore scores and bias, by name, as a check loads no router.
FORCED_ROUTERS = ("balanced", "hash")

RULES: list[Rule] = []
rule = adder_to(RULES)


@rule("model.hidden_size", "model.n_heads", "model.head_dim")
def _heads(config: Config, world: int) -> Iterator[str]:
    if config.model.head_dim == 0:
        hidden = f"model.hidden_size ({config.model.hidden_size})"
        yield wrong(config, "model.n_heads", f"divide {hidden}, unless model.head_dim is set")
    elif config.model.attention == "gqa" and config.model.head_dim % 2:
        yield wrong(config, "model.head_dim", "be even, as RoPE turns pairs")


@rule("model.head_dim", "model.mla.v_head_dim")
def _masked_heads(config: Config, world: int) -> Iterator[str]:
    """FlexAttention, which masks documents on a GPU, has no smaller heads."""
    sizes = {"model.head_dim": config.model.head_dim}
    if config.model.attention == "mla":
        sizes["model.mla.v_head_dim"] = config.model.mla.v_head_dim
    for key, size in sizes.items():
        if 0 < size < 16 and config.data.document_mask and config.run.device == "cuda":
            yield wrong(config, key, "be at least 16 with data.document_mask on a GPU")


@rule("model.head_dim", "model.mla.qk_nope_head_dim", "model.mla.qk_rope_head_dim")
def _latent_heads(config: Config, world: int) -> Iterator[str]:
    model, mla = config.model, config.model.mla
    if model.attention != "mla":
        return
    parts = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    if mla.qk_rope_head_dim % 2:
        yield wrong(config, "model.mla.qk_rope_head_dim", "be even, as RoPE turns pairs")
    if model.head_dim != parts:
        sizes = f"model.mla.qk_nope_head_dim + model.mla.qk_rope_head_dim ({parts})"
        yield wrong(config, "model.head_dim", f"be 0 or {sizes}")


@rule("model.head_dim", "model.partial_rotary_factor")
def _partial_rotary_factor(config: Config, world: int) -> Iterator[str]:
    model = config.model
    turned = model.head_dim * model.partial_rotary_factor
    # An odd head is the complaint of another rule.
    if model.attention == "gqa" and model.head_dim % 2 == 0 and turned % 2:
        allowed = f"give an even part of model.head_dim ({model.head_dim}), and gives {turned:g}"
        yield wrong(config, "model.partial_rotary_factor", allowed)


@rule("model.yarn.beta_fast", "model.yarn.beta_slow")
def _yarn(config: Config, world: int) -> Iterator[str]:
    yarn = config.model.yarn
    if yarn.beta_slow > yarn.beta_fast:
        fast = f"model.yarn.beta_fast ({yarn.beta_fast:g})"
        yield wrong(config, "model.yarn.beta_slow", f"be at most {fast}")


@rule("model.n_heads", "model.n_kv_heads")
def _kv_heads(config: Config, world: int) -> Iterator[str]:
    if config.model.attention == "gqa" and config.model.n_heads % config.model.n_kv_heads:
        heads = f"model.n_heads ({config.model.n_heads})"
        yield wrong(config, "model.n_kv_heads", f"divide {heads}")


@rule("model.n_layers", "model.n_dense_layers")
def _dense_layers(config: Config, world: int) -> Iterator[str]:
    if config.model.n_dense_layers > config.model.n_layers:
        layers = f"0..model.n_layers ({config.model.n_layers})"
        yield wrong(config, "model.n_dense_layers", f"be in {layers}")


@rule("model.hidden_size", "moe.hidden_size")
def _moe_hidden_size(config: Config, world: int) -> Iterator[str]:
    if config.moe.hidden_size != config.model.hidden_size:
        hidden = f"model.hidden_size ({config.model.hidden_size})"
        yield wrong(config, "moe.hidden_size", f"be 0 or {hidden}")


@rule("moe.num_experts", "moe.top_k", of_layer=True)
def _top_k(config: Config, world: int) -> Iterator[str]:
    if config.moe.top_k > config.moe.num_experts:
        yield wrong(config, "moe.top_k", f"be in 1..moe.num_experts ({config.moe.num_experts})")


@rule(of_layer=True)
def _renormalize(config: Config, world: int) -> Iterator[str]:
    if config.moe.router == "topk_softmax" and config.moe.renormalize != "topk":
        yield wrong(config, "moe.renormalize", "be topk with moe.router 'topk_softmax'")


@rule("moe.bias_update_rate", of_layer=True)
def _bias_update_rate(config: Config, world: int) -> Iterator[str]:
    if 0 < config.moe.bias_update_rate < KEY_UNIT:
        yield wrong(
            config, "moe.bias_update_rate", f"be 0 or at least {KEY_UNIT}, the unit of a bias"
        )
    elif config.moe.bias_update_rate > 0 and config.moe.router in FORCED_ROUTERS:
        router = f"moe.router '{config.moe.router}'"
        yield wrong(
            config, "moe.bias_update_rate", f"be 0 with {router}, whose choice follows no bias"
        )


@rule(
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


@rule("parallel.ep", "parallel.ranks_per_node")
def _node_level(config: Config, world: int) -> Iterator[str]:
    ep, per_node = config.parallel.ep, config.parallel.ranks_per_node
    if config.moe.dispatch.level == "node" and 0 < per_node < ep and ep % per_node:
        yield wrong(
            config,
            "parallel.ranks_per_node",
            f"divide parallel.ep ({ep}) with moe.dispatch.level 'node'",
        )


@rule("moe.num_experts", "parallel.ep", of_layer=True)
def _experts_per_rank(config: Config, world: int) -> Iterator[str]:
    if config.moe.num_experts % config.parallel.ep:
        yield wrong(
            config, "moe.num_experts", f"be a multiple of parallel.ep ({config.parallel.ep})"
        )


@rule("moe.num_experts", "moe.rounding.balance_groups", of_layer=True)
def _balance_groups(config: Config, world: int) -> Iterator[str]:
    groups = config.moe.rounding.balance_groups
    if groups and config.moe.num_experts % groups:
        experts = f"moe.num_experts ({config.moe.num_experts})"
        yield wrong(config, "moe.rounding.balance_groups", f"be 0 or divide {experts}")


@rule("moe.num_experts", "moe.rounding.balance_groups", "parallel.ep", of_layer=True)
def _capacity_of_ranks(config: Config, world: int) -> Iterator[str]:
    """A group of several ranks bounds none of them."""
    rounding, ep = config.moe.rounding, config.parallel.ep
    bounds = rounding.capacity_factor > 0 and rounding.capacity_of == "rank"
    if bounds and rounding.scope == "ep" and rounding.balance_groups % ep:
        allowed = f"be 0 or a multiple of parallel.ep ({ep}) with moe.rounding.capacity_of 'rank'"
        yield wrong(config, "moe.rounding.balance_groups", allowed)


@rule("moe.rounding.capacity_factor", of_layer=True)
def _capacity_factor(config: Config, world: int) -> Iterator[str]:
    if 0 < config.moe.rounding.capacity_factor < 1:
        yield wrong(
            config,
            "moe.rounding.capacity_factor",
            "be 0 for no bound, or at least 1: below, even experts of equal load lose pairs",
        )


@rule("moe.rounding.tile", "train.micro_batch_size", "data.seq_len", "parallel.ep", "parallel.cp")
def _tile(config: Config, world: int) -> Iterator[str]:
    tokens = rank_tokens(config)
    whose, product = "a rank's", "train.micro_batch_size * data.seq_len"
    if config.parallel.cp > 1:
        product += " / parallel.cp"
    if config.moe.rounding.scope == "ep":
        tokens *= config.parallel.ep
        whose, product = "an expert-parallel group's", f"{product} * parallel.ep"
    rounds = config.moe.rounding.rule != "none"
    # Without a micro-batch there is another complaint, and no number of tokens.
    if rounds and config.train.micro_batch_size and config.moe.rounding.tile > tokens:
        yield wrong(
            config,
            "moe.rounding.tile",
            f"be at most the tokens of {whose} micro-batch, {product} ({tokens})",
        )


@rule("parallel.ep", of_layer=True)
def _local_exchange(config: Config, world: int) -> Iterator[str]:
    if config.moe.dispatch.exchange == "local" and config.parallel.ep > 1:
        others = ", ".join(name for name in EXCHANGES if name != "local")
        ranks = f"parallel.ep ({config.parallel.ep})"
        yield wrong(config, "moe.dispatch.exchange", f"be auto or one of {others} with {ranks}")


@rule("parallel.ep", "moe.dispatch.steps")
def _steps_by_source(config: Config, world: int) -> Iterator[str]:
    peers = max(1, config.parallel.ep - 1)
    dispatch = config.moe.dispatch
    # Level node has an order of its own.
    if dispatch.order == "source" and dispatch.level != "node" and dispatch.steps > peers:
        yield wrong(
            config,
            "moe.dispatch.steps",
            f"be at most {peers} with moe.dispatch.order source and parallel.ep "
            f"{config.parallel.ep}",
        )
