"""DeepSeek-V2 and V2-Lite: scores by a softmax over all experts, without a bias. A group, if there
are any, counts as its best expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distmoe.convert.architecture import Architecture, Field, Only
from distmoe.convert.deepseek_mla import MLA_FIELDS, MLA_FIXED, MLA_NAMES, MLA_ONLY
from distmoe.convert.deepseek_moe import MOE_FIXED, MOE_NAMES, MOE_ONLY, WIDTHS, group_count
from distmoe.convert.llama_like import NAMES

METHODS = {False: "greedy", True: "group_limited_greedy"}


def _has_groups(hf: Mapping[str, Any]) -> bool:
    return bool(hf.get("topk_method", METHODS[False]) == METHODS[True])


def _groups_of_method(method: str, hf: Mapping[str, Any]) -> int:
    if method not in METHODS.values():
        raise ValueError(f"be one of {', '.join(METHODS.values())}")
    # How many they are is said by n_group, and missed there.
    return int(hf.get("n_group") or 0) if method == METHODS[True] else 0


def _of_groups(count: int | None, hf: Mapping[str, Any]) -> int:
    if not _has_groups(hf):
        return 0
    if not count:
        raise ValueError(f"be at least 1 with topk_method '{METHODS[True]}'")
    return count


ARCHITECTURE = Architecture(
    model_type="deepseek_v2",
    class_name="DeepseekV2ForCausalLM",
    fields=(
        *MLA_FIELDS,
        *WIDTHS,
        Field(
            "topk_method",
            "moe.expert_groups",
            METHODS[False],
            _groups_of_method,
            to_key=lambda groups, config: METHODS[groups > 1],
        ),
        Field(
            "n_group",
            "moe.expert_groups",
            None,
            _of_groups,
            group_count("max"),
        ),
        Field(
            "topk_group",
            "moe.groups_per_token",
            None,
            _of_groups,
            to_key=lambda count, config: count or 1,
        ),
    ),
    fixed={
        **MLA_FIXED,
        **MOE_FIXED,
        "moe.router": ("softmax_topk",),
        "moe.renormalize": ("none",),
        "moe.bias_update_rate": (0.0,),
        "moe.group_score": ("max", "sum", "top2"),
    },
    only={
        **MLA_ONLY,
        **{key: only for key, only in MOE_ONLY.items() if key != "topk_method"},
        "scoring_func": Only("softmax", "scores are a softmax"),
        "norm_topk_prob": Only(False, "a pair's weight is its score"),
        "mlp_bias": Only(False, "projections have no bias"),
    },
    names={
        **NAMES,
        **MLA_NAMES,
        **{key: names for key, names in MOE_NAMES.items() if not key.endswith("bias_E")},
    },
)
