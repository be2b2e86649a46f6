"""OLMoE: queries and keys normed over all heads, and clipped, if at all, after that."""

from __future__ import annotations

from distmoe.convert.architecture import Architecture, Field
from distmoe.convert.llama_like import FIELDS, FIXED, NAMES, ONLY, norm_topk_prob

ARCHITECTURE = Architecture(
    model_type="olmoe",
    class_name="OlmoeForCausalLM",
    fields=(
        # Its head size follows from the other sizes.
        *(field for field in FIELDS if field.key != "head_dim"),
        norm_topk_prob(),
        Field("num_experts", "moe.num_experts", alias="num_local_experts"),
        Field("intermediate_size", "moe.intermediate_size"),
        Field(
            "clip_qkv",
            "model.clip_qkv",
            None,
            to_setting=lambda limit, hf: float(limit or 0),
            to_key=lambda limit, config: limit or None,
        ),
    ),
    fixed={
        **{key: values for key, values in FIXED.items() if key != "model.clip_qkv"},
        "model.qk_norm": (True,),
        "model.qk_norm_scope": ("projection",),
        "model.n_dense_layers": (0,),
    },
    only=ONLY,
    names=NAMES,
    derives_head_dim=True,
)
