"""DeepSeek-V3, and what has its architecture, such as Moonlight."""

from __future__ import annotations

from distmoe.convert.architecture import Architecture
from distmoe.convert.deepseek_mla import MLA_FIELDS, MLA_FIXED, MLA_NAMES, MLA_ONLY
from distmoe.convert.deepseek_moe import (
    GROUPS,
    MOE_FIXED,
    MOE_INITIAL,
    MOE_NAMES,
    MOE_ONLY,
    WIDTHS,
    WRITTEN,
)
from distmoe.convert.llama_like import NAMES, norm_topk_prob

ARCHITECTURE = Architecture(
    model_type="deepseek_v3",
    class_name="DeepseekV3ForCausalLM",
    fields=(*MLA_FIELDS, *WIDTHS, *GROUPS, norm_topk_prob(default=True)),
    fixed={**MLA_FIXED, **MOE_FIXED},
    only={**MLA_ONLY, **MOE_ONLY},
    names={**NAMES, **MLA_NAMES, **MOE_NAMES},
    initial=MOE_INITIAL,
    written=WRITTEN,
)
