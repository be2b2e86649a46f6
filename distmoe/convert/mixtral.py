"""Mixtral: no norm of queries and keys; a token's expert weights sum to 1."""

from __future__ import annotations

from distmoe.convert.architecture import Architecture, Field, Only
from distmoe.convert.llama_like import FIELDS, FIXED, LAYER, NAMES, ONLY

EXPERTS = f"{LAYER}.block_sparse_moe.experts.{{expert}}"

ARCHITECTURE = Architecture(
    model_type="mixtral",
    class_name="MixtralForCausalLM",
    fields=(
        *FIELDS,
        Field("num_local_experts", "moe.num_experts", alias="num_experts"),
        Field("intermediate_size", "moe.intermediate_size"),
    ),
    fixed={
        **FIXED,
        "model.qk_norm": (False,),
        "model.n_dense_layers": (0,),
        "moe.router": ("topk_softmax", "softmax_topk"),
        "moe.renormalize": ("topk", "assigned"),
    },
    only={**ONLY, "router_jitter_noise": Only(0.0, "the router adds no noise")},
    names={
        **NAMES,
        "blocks.{layer}.mlp.router_EH": (f"{LAYER}.block_sparse_moe.gate.weight",),
        "blocks.{layer}.mlp.experts.w_in_eGH": (f"{EXPERTS}.w1.weight", f"{EXPERTS}.w3.weight"),
        "blocks.{layer}.mlp.experts.w_out_eHI": (f"{EXPERTS}.w2.weight",),
    },
)
