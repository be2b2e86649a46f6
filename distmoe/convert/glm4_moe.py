"""GLM-4.5, GLM-4.5-Air and GLM-4.6: grouped queries with biases, half of which RoPE turns, and the
experts of DeepSeek-V3."""

from __future__ import annotations

from distmoe.convert.architecture import Architecture, Field, number
from distmoe.convert.deepseek_moe import (
    GROUPS,
    MOE_FIXED,
    MOE_INITIAL,
    MOE_NAMES,
    MOE_ONLY,
    WIDTHS,
    WRITTEN,
)
from distmoe.convert.llama_like import FIELDS, FIXED, LAYER, NAMES, norm_topk_prob

ARCHITECTURE = Architecture(
    model_type="glm4_moe",
    class_name="Glm4MoeForCausalLM",
    fields=(
        *FIELDS,
        *WIDTHS,
        *GROUPS,
        norm_topk_prob(default=True),
        Field("partial_rotary_factor", "model.partial_rotary_factor", 0.5, number),
        Field("attention_bias", "model.qkv_bias", False),
        Field("use_qk_norm", "model.qk_norm", False),
    ),
    fixed={
        **{key: FIXED[key] for key in ("model.attention", "model.yarn.factor", "model.clip_qkv")},
        **MOE_FIXED,
        "model.qk_norm_scope": ("head",),
    },
    only=MOE_ONLY,
    names={
        **NAMES,
        **MOE_NAMES,
        **{
            f"blocks.{{layer}}.attention.{name}.bias": (f"{LAYER}.self_attn.{name}.bias",)
            for name in ("q_proj", "k_proj", "v_proj")
        },
    },
    initial=MOE_INITIAL,
    written=WRITTEN,
)
