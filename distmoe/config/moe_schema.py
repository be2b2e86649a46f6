"""Settings of the MoE layers: the section [moe]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class RoundingConfig:
    """Token rounding: each expert's token count becomes a multiple of the tile."""

    rule: str = "balance"
    """Which experts round up: balance, nearest, up, down, stochastic or score; none: no
    rounding."""
    tile: int = 128
    """M, rows of a GEMM tile."""
    selection: str = "exact"
    """Which pairs are dropped or added. exact: those that one process would choose. quota: each
    rank's share of them, without a round of communication."""
    scope: Literal["ep", "rank"] = "ep"
    """Tokens that are rounded together: of all ranks of the ep axis, or of each rank on its own,
    which is aligned too but moves many more pairs: for comparisons."""
    balance_groups: int = 0
    """Equal runs of experts over which `balance` levels the tiles. 0: the ranks of the ep axis."""
    seed: int = 0
    """Seed of the rules that draw, stochastic and score."""
    capacity_factor: float = 0.0
    """Most pairs of an expert, or of all experts of a rank, over the mean, with a rule rounded up
    to whole tiles; beyond, those of the lowest scores are dropped. 0: no bound."""
    capacity_of: Literal["expert", "rank"] = "expert"
    """What has the capacity. rank: the experts of a rank (of a balance group) share it, of which
    started tiles count whole; drops less."""
    transport: str = "auto"
    """How `exact` compares candidates: on every rank, or on the owner of each expert. auto: owner
    above 16 ranks."""


@dataclass(frozen=True)
class DispatchConfig:
    """How rows travel between the ranks of the ep axis."""

    overlap: bool = True
    """Compute while rows travel. false: the same work, waiting for every transfer at once."""
    level: Literal["auto", "copies", "rank", "node"] = "auto"
    """rank: a token's row travels once to every rank that has one of its experts. node: once to
    every other node that has one, where it is passed on. copies: once for every expert, the
    baseline. auto: what the measured links make fastest; without a profile node if the ep axis
    spans several nodes, else rank; never node on GPUs, where it has not been tried."""
    order: Literal["auto", "source", "tokens"] = "auto"
    """What a step of the exchange brings. source: all rows of some ranks. tokens: a part of every
    rank's rows."""
    steps: int = 0
    """Steps of the exchange. 0: as many as the links and the tiles make worth it."""
    row_dtype: str = "computed"
    """In what form rows travel to the experts, x and in the backward dy. computed: as experts
    compute with them. bf16: fp32 rows in half the bytes. fp8: e4m3 with a scale, a power of two,
    for every 128 values (DeepSeek-V3). Rows that stay on their rank are rounded too."""
    sum_dtype: Literal["computed", "bf16"] = "computed"
    """Dtype in which partial sums travel home, y and in the backward dx. bf16: where fp32 is
    computed with."""
    exchange: str = "auto"
    """Transport. auto: local for ep = 1, point-to-point on gloo, all-to-all on NCCL."""


@dataclass(frozen=True)
class MoEConfig:
    """One mixture-of-experts layer."""

    hidden_size: int = 0
    """H. 0 in a run's config: model.hidden_size."""
    intermediate_size: int = 128
    """I, of one expert."""
    num_experts: int = 16
    """E, over all ranks."""
    top_k: int = 4
    """K, experts that a token chooses."""
    shared_intermediate_size: int = 0
    """Width of the shared expert that every token passes. 0: none."""
    router: str = "softmax_topk"
    """softmax_topk, topk_softmax or sigmoid_topk. For benchmarks and tests, a forced choice:
    balanced or hash."""
    renormalize: Literal["topk", "assigned", "none"] = "topk"
    """A pair's weight is its score over the token's top-k score sum, over the sum of the
    assigned pairs, or the score itself."""
    score_scale: float = 1.0
    """Factor on the weights of all pairs (DeepSeek's routed scaling factor)."""
    bias_update_rate: float = 0.0
    """Step by which an expert's bias, added to its scores for the choice only, follows its load
    after each optimizer step (DeepSeek-V3: 0.001). 0: no bias."""
    expert_groups: int = 0
    """Equal runs of experts, of which a token may use groups_per_token. 0 or 1: no limit."""
    groups_per_token: int = 0
    """Groups whose experts a token may choose, with expert_groups."""
    nodes_per_token: int = 0
    """Nodes of the ep axis whose experts a token may choose; excludes expert_groups. 0: no
    limit."""
    group_score: Literal["max", "top2", "sum"] = "sum"
    """A group (or node) counts as its best expert, as its two best, or as its best
    top_k / groups_per_token, rounded up."""
    load_balance_coef: float = 0.01
    """Weight of the load-balance loss."""
    load_balance_scope: Literal["global", "micro_batch", "ep", "rank", "sequence"] = "global"
    """Tokens over which expert frequencies are counted. global: all ranks and the micro-batches of
    the step so far. Of one micro-batch: all ranks, the ep group, the rank, or each sequence."""
    z_loss_coef: float = 0.001
    """Weight of the router z-loss."""
    activation: Literal["swiglu", "geglu", "reglu", "silu", "gelu", "relu2"] = "swiglu"
    """Between the projections of an expert: gated, with two input matrices (swiglu, geglu, reglu),
    or plain, with one."""
    kernel: str = "auto"
    """Backend of the expert MLP. auto: triton on a GPU that it runs on, else torch."""
    kernel_tiles: str = "auto"
    """Tile configurations of the kernels. auto: those that were measured on such a device, if
    they ship with distmoe; else, and with default, the defaults. Or a file that
    `tools/bench_moe.py --write-tiles` wrote."""
    rounding: RoundingConfig = field(default_factory=RoundingConfig)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
