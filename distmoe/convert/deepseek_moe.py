"""The experts of DeepSeek's models and of those that took them over, such as GLM-4.5: a few dense
layers first, shared experts, groups, and since DeepSeek-V3 scores by a sigmoid and a bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distmoe.config import Config
from distmoe.convert.architecture import Field, Only, number
from distmoe.convert.llama_like import DENSE_MLP, FIXED, LAYER, ONLY

SHARED = f"{LAYER}.mlp.shared_experts"


def _shared_width(count: int, hf: Mapping[str, Any]) -> int:
    return count * int(hf["moe_intermediate_size"])


def _shared_count(width: int, config: Config) -> int:
    one = config.moe.intermediate_size
    if width % one:
        raise ValueError(f"be a multiple of moe.intermediate_size ({one})")
    return width // one


def _groups(count: int, hf: Mapping[str, Any]) -> int:
    return count if count > 1 else 0


def group_count(score: str) -> Callable[[int, Config], int]:
    """n_group of a model whose groups count by ``score``, one of moe.group_score."""

    def to_key(groups: int, config: Config) -> int:
        own = config.moe.group_score
        if groups > 1 and own != score:
            raise ValueError(f"be 0 with moe.group_score '{own}', which is not {score}")
        return max(groups, 1)

    return to_key


def _groups_per_token(count: int, hf: Mapping[str, Any]) -> int:
    return count if hf["n_group"] > 1 else 0


WIDTHS = (
    Field("moe_intermediate_size", "moe.intermediate_size"),
    Field("intermediate_size", "model.intermediate_size"),
    Field("n_routed_experts", "moe.num_experts", alias="num_local_experts"),
    Field(
        "n_shared_experts",
        "moe.shared_intermediate_size",
        to_setting=_shared_width,
        to_key=_shared_count,
    ),
    Field("first_k_dense_replace", "model.n_dense_layers"),
    Field("routed_scaling_factor", "moe.score_scale", to_setting=number),
)

# DeepSeek-V3 counts a group as its two best experts.
GROUPS = (
    Field("n_group", "moe.expert_groups", to_setting=_groups, to_key=group_count("top2")),
    Field(
        "topk_group",
        "moe.groups_per_token",
        to_setting=_groups_per_token,
        to_key=lambda count, config: count or 1,
    ),
)

MOE_FIXED: dict[str, tuple[Any, ...]] = {
    "moe.router": ("sigmoid_topk",),
    "moe.group_score": ("top2", "sum", "max"),
    "moe.nodes_per_token": FIXED["moe.nodes_per_token"],
    "moe.activation": FIXED["moe.activation"],
}

# The rate of DeepSeek-V3's own training; a layer has a bias only if it moves.
MOE_INITIAL = {"moe.bias_update_rate": 0.001}

MOE_ONLY = {
    **{key: ONLY[key] for key in ("hidden_act", "attention_dropout")},
    "moe_layer_freq": Only(1, "every layer after the dense ones has experts"),
    "scoring_func": Only("sigmoid", "scores are sigmoids"),
    "topk_method": Only("noaux_tc", "a group counts as its two best experts, with their bias"),
    "quantization_config": Only(
        None,
        "weights must be bfloat16, float16 or float32; fp8 in blocks becomes bfloat16 by "
        "inference/fp8_cast_bf16.py of the DeepSeek-V3 repository: then delete this key",
    ),
}

# Layers that predict further tokens are not trained, and so not exported.
WRITTEN = {"num_nextn_predict_layers": 0}

MOE_NAMES = {
    **DENSE_MLP,
    "blocks.{layer}.mlp.bias_E": (f"{LAYER}.mlp.gate.e_score_correction_bias",),
    "blocks.{layer}.mlp.shared.in_proj.weight": (
        f"{SHARED}.gate_proj.weight",
        f"{SHARED}.up_proj.weight",
    ),
    "blocks.{layer}.mlp.shared.out_proj.weight": (f"{SHARED}.down_proj.weight",),
}
