"""Latent attention as DeepSeek-V2 and V3 have it in config.json and in their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmoe.convert.architecture import Field, Only
from distmoe.convert.llama_like import COMMON_FIELDS, LAYER, ONLY
from distmoe.convert.yarn import YARN

SELF = f"{LAYER}.self_attn"


def _every_head(count: int, hf: Mapping[str, Any]) -> int:
    heads = int(hf["num_attention_heads"])
    if count != heads:
        raise ValueError(f"be num_attention_heads ({heads}): every head has keys of its own")
    return heads


MLA_FIELDS = (
    *COMMON_FIELDS,
    Field("num_key_value_heads", "model.n_heads", to_setting=_every_head),
    Field(
        "q_lora_rank",
        "model.mla.q_lora_rank",
        1536,
        to_setting=lambda rank, hf: rank or 0,
        to_key=lambda rank, config: rank or None,
    ),
    Field("kv_lora_rank", "model.mla.kv_lora_rank"),
    Field("qk_nope_head_dim", "model.mla.qk_nope_head_dim"),
    Field("qk_rope_head_dim", "model.mla.qk_rope_head_dim"),
    Field("v_head_dim", "model.mla.v_head_dim"),
    YARN,
)

MLA_FIXED: dict[str, tuple[Any, ...]] = {"model.attention": ("mla",)}

MLA_ONLY = {
    "attention_bias": ONLY["attention_bias"],
    "rope_interleave": Only(True, "RoPE turns neighbours"),
}

MLA_NAMES = {
    "blocks.{layer}.attention.q_a_proj.weight": (f"{SELF}.q_a_proj.weight",),
    "blocks.{layer}.attention.q_a_norm.weight": (f"{SELF}.q_a_layernorm.weight",),
    "blocks.{layer}.attention.q_b_proj.weight": (f"{SELF}.q_b_proj.weight",),
    "blocks.{layer}.attention.kv_a_proj.weight": (f"{SELF}.kv_a_proj_with_mqa.weight",),
    "blocks.{layer}.attention.kv_a_norm.weight": (f"{SELF}.kv_a_layernorm.weight",),
    "blocks.{layer}.attention.kv_b_proj.weight": (f"{SELF}.kv_b_proj.weight",),
}
