"""What the architectures have in common: Llama's attention and norms, and experts of SwiGLU."""

from __future__ import annotations

from typing import Any

from distmoe.convert.architecture import Field, Only, number

LAYER = "model.layers.{layer}"

COMMON_FIELDS = (
    Field("vocab_size", "model.vocab_size"),
    Field("hidden_size", "model.hidden_size"),
    Field("num_hidden_layers", "model.n_layers"),
    Field("num_attention_heads", "model.n_heads"),
    Field("rope_theta", "model.rope_theta", to_setting=number),
    Field("rms_norm_eps", "model.norm_eps", to_setting=number),
    Field("initializer_range", "model.init_std", 0.02, to_setting=number),
    Field("tie_word_embeddings", "model.tie_embeddings", False),
    Field("num_experts_per_tok", "moe.top_k"),
)

FIELDS = (
    *COMMON_FIELDS,
    Field("num_key_value_heads", "model.n_kv_heads"),
    Field("head_dim", "model.head_dim"),
)

# One value each, or several that compute the same when nothing is rounded.
FIXED: dict[str, tuple[Any, ...]] = {
    "model.attention": ("gqa",),
    "model.partial_rotary_factor": (1.0,),
    "model.qkv_bias": (False,),
    "model.yarn.factor": (1.0,),
    "model.clip_qkv": (0.0,),
    "moe.router": ("softmax_topk", "topk_softmax"),
    "moe.shared_intermediate_size": (0,),
    "moe.score_scale": (1.0,),
    "moe.bias_update_rate": (0.0,),
    "moe.expert_groups": (0, 1),
    "moe.nodes_per_token": (0,),
    "moe.activation": ("swiglu",),
}

ONLY = {
    "hidden_act": Only("silu", "experts are SwiGLU"),
    "attention_bias": Only(False, "projections have no bias"),
    "attention_dropout": Only(0.0, "there is no dropout"),
    "sliding_window": Only(None, "attention sees all earlier tokens"),
    "quantization_config": Only(None, "weights must be bfloat16, float16 or float32"),
}

NAMES = {
    "embedding.weight": ("model.embed_tokens.weight",),
    "final_norm.weight": ("model.norm.weight",),
    "head.weight": ("lm_head.weight",),
    "blocks.{layer}.attention_norm.weight": (f"{LAYER}.input_layernorm.weight",),
    "blocks.{layer}.mlp_norm.weight": (f"{LAYER}.post_attention_layernorm.weight",),
    "blocks.{layer}.attention.q_proj.weight": (f"{LAYER}.self_attn.q_proj.weight",),
    "blocks.{layer}.attention.k_proj.weight": (f"{LAYER}.self_attn.k_proj.weight",),
    "blocks.{layer}.attention.v_proj.weight": (f"{LAYER}.self_attn.v_proj.weight",),
    "blocks.{layer}.attention.o_proj.weight": (f"{LAYER}.self_attn.o_proj.weight",),
    "blocks.{layer}.attention.q_norm.weight": (f"{LAYER}.self_attn.q_norm.weight",),
    "blocks.{layer}.attention.k_norm.weight": (f"{LAYER}.self_attn.k_norm.weight",),
    "blocks.{layer}.mlp.router_EH": (f"{LAYER}.mlp.gate.weight",),
    "blocks.{layer}.mlp.experts.w_in_eGH": (
        f"{LAYER}.mlp.experts.{{expert}}.gate_proj.weight",
        f"{LAYER}.mlp.experts.{{expert}}.up_proj.weight",
    ),
    "blocks.{layer}.mlp.experts.w_out_eHI": (f"{LAYER}.mlp.experts.{{expert}}.down_proj.weight",),
}

DENSE_MLP = {
    "blocks.{layer}.mlp.in_proj.weight": (
        f"{LAYER}.mlp.gate_proj.weight",
        f"{LAYER}.mlp.up_proj.weight",
    ),
    "blocks.{layer}.mlp.out_proj.weight": (f"{LAYER}.mlp.down_proj.weight",),
}

RENORMALIZE = {True: "topk", False: "none"}


def norm_topk_prob(*, default: bool = False) -> Field:
    """Whether the weights of a token's experts sum to 1."""
    return Field(
        "norm_topk_prob",
        "moe.renormalize",
        default,
        to_setting=lambda value, hf: RENORMALIZE[bool(value)],
        to_key=lambda name, config: name != "none",
    )
