"""The range of every number, whatever the other settings are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

from distmoe.config.keys import value_of
from distmoe.config.schema import Config


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``; an open end is not itself in the range."""

    low: float
    high: float = inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        # inf and nan are TOML, but no setting.
        return above and below and abs(number) < inf

    def __str__(self) -> str:
        if self.high == inf:
            return f"{'greater than' if self.open_low else 'at least'} {self.low:g}"
        opening, closing = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"in {opening}{self.low:g}, {self.high:g}{closing}"


COUNT = Range(1)
COUNT_OR_UNSET = Range(0)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)
SHARE = Range(0, 1)
DECAY = Range(0, 1, open_high=True)

RANGES = {
    "run.seed": Range(0, 2**63 - 1),
    "launch.nproc": COUNT,
    "launch.threads": COUNT_OR_UNSET,
    "launch.timeout_s": POSITIVE,
    "launch.stall_warning_s": POSITIVE,
    "model.vocab_size": COUNT_OR_UNSET,
    "model.hidden_size": COUNT,
    "model.n_layers": COUNT,
    "model.n_dense_layers": NOT_NEGATIVE,
    "model.n_heads": COUNT,
    "model.n_kv_heads": COUNT,
    "model.head_dim": COUNT_OR_UNSET,
    "model.intermediate_size": COUNT,
    "model.rope_theta": POSITIVE,
    "model.partial_rotary_factor": Range(0, 1, open_low=True),
    "model.norm_eps": POSITIVE,
    "model.init_std": POSITIVE,
    "model.yarn.factor": Range(1),
    "model.yarn.original_positions": COUNT,
    "model.yarn.beta_fast": POSITIVE,
    "model.yarn.beta_slow": POSITIVE,
    "model.yarn.mscale": NOT_NEGATIVE,
    "model.yarn.mscale_all_dim": NOT_NEGATIVE,
    "model.mla.q_lora_rank": COUNT_OR_UNSET,
    "model.mla.kv_lora_rank": COUNT,
    "model.mla.qk_nope_head_dim": COUNT,
    "model.mla.qk_rope_head_dim": COUNT,
    "model.mla.v_head_dim": COUNT,
    "moe.hidden_size": COUNT_OR_UNSET,
    "moe.intermediate_size": COUNT,
    "moe.num_experts": COUNT,
    "moe.top_k": COUNT,
    "moe.score_scale": POSITIVE,
    "moe.bias_update_rate": SHARE,
    "moe.expert_groups": COUNT_OR_UNSET,
    "moe.groups_per_token": COUNT_OR_UNSET,
    "moe.nodes_per_token": COUNT_OR_UNSET,
    "moe.shared_intermediate_size": COUNT_OR_UNSET,
    "moe.load_balance_coef": NOT_NEGATIVE,
    "moe.z_loss_coef": NOT_NEGATIVE,
    "moe.rounding.tile": COUNT,
    "moe.rounding.balance_groups": COUNT_OR_UNSET,
    "moe.rounding.seed": Range(0, 2**63 - 1),
    "moe.rounding.capacity_factor": NOT_NEGATIVE,
    "moe.dispatch.steps": COUNT_OR_UNSET,
    "parallel.dp_replicate": COUNT,
    "parallel.dp_shard": COUNT_OR_UNSET,
    "parallel.ep": COUNT,
    "parallel.cp": COUNT,
    "parallel.ranks_per_node": COUNT_OR_UNSET,
    "model.clip_qkv": NOT_NEGATIVE,
    "deepspeed.zero_stage": Range(0, 3),
    "deepspeed.bucket_elements": COUNT,
    "deepspeed.persistence_elements": NOT_NEGATIVE,
    "data.seq_len": COUNT,
    "optim.lr": POSITIVE,
    "optim.beta1": DECAY,
    "optim.beta2": DECAY,
    "optim.eps": POSITIVE,
    "optim.momentum": DECAY,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.clip_norm": NOT_NEGATIVE,
    "optim.warmup_steps": NOT_NEGATIVE,
    "optim.decay_steps": COUNT_OR_UNSET,
    "optim.min_lr_ratio": SHARE,
    "train.steps": COUNT,
    "train.max_minutes": NOT_NEGATIVE,
    "train.global_batch_size": COUNT,
    "train.micro_batch_size": COUNT_OR_UNSET,
    "train.loss_chunk_tokens": COUNT_OR_UNSET,
    "train.max_skipped_steps": COUNT,
    "train.validate_every": NOT_NEGATIVE,
    "train.validation_batches": COUNT,
    "train.record_routing": NOT_NEGATIVE,
    "checkpoint.every": NOT_NEGATIVE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_every": NOT_NEGATIVE,
    "metrics.log_every": COUNT,
    "metrics.expert_load_every": COUNT,
    "metrics.layer_table_every": NOT_NEGATIVE,
}


def out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    """The keys whose number is out of its range, with the message of each."""
    for key, allowed in RANGES.items():
        value = value_of(config, key)
        if value not in allowed:
            yield key, f"{key} is {value}; it must be {allowed}"
