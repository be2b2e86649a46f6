"""Settings that were changed and that, with the others, nothing reads."""

from __future__ import annotations

from collections.abc import Iterator

from distmoe.config.keys import key_types, value_of
from distmoe.config.schema import Config

GQA_KEYS = (
    "model.n_kv_heads",
    "model.partial_rotary_factor",
    "model.qkv_bias",
    "model.qk_norm",
    "model.qk_norm_scope",
    "model.clip_qkv",
)

# Keys, or sections, that only one value of another key makes a difference to. A key that configs
# carry along while another is tried, such as the tile without a rule, is not in it.
ONLY_WITH = {
    "model.mla": ("model.attention", "mla"),
    **dict.fromkeys(GQA_KEYS, ("model.attention", "gqa")),
    "deepspeed": ("parallel.engine", "deepspeed"),
    "parallel.reshard_after_forward": ("parallel.engine", "fsdp2"),
    "optim.momentum": ("optim.name", "muon"),
    "parallel.reduce_gradients": ("parallel.engine", "fsdp2"),
    "optim.decay_steps": ("optim.schedule", "wsd"),
}

# And those that one value leaves unread.
NOT_WITH = {
    "model.yarn": ("model.yarn.factor", 1.0),
    "moe.dispatch.sum_dtype": ("train.dtype", "bf16"),
}


def unused_settings(config: Config) -> Iterator[str]:
    """A line for each of a resolved config that differs from its default and has no effect."""
    for prefix, (other, needed) in ONLY_WITH.items():
        if value_of(config, other) != needed:
            yield from _changed(config, prefix, other)
    for prefix, (other, without) in NOT_WITH.items():
        if value_of(config, other) == without:
            yield from _changed(config, prefix, other)


def _changed(config: Config, prefix: str, other: str) -> Iterator[str]:
    default = Config()
    for key in key_types():
        value = value_of(config, key)
        if value != value_of(default, key) and f"{key}.".startswith(f"{prefix}."):
            yield f"{key} is {value}; it has no effect with {other} {value_of(config, other)!r}"
