"""Qwen3-MoE: queries and keys normed per head; the first layers may be dense."""

from __future__ import annotations

from typing import Any

from distmoe.convert.architecture import Architecture, Field, Only
from distmoe.convert.llama_like import DENSE_MLP, FIELDS, FIXED, NAMES, ONLY, norm_topk_prob


def _first_layers(layers: list[int] | None, hf: Any) -> int:
    """How many layers are dense. ValueError if they are not the first ones."""
    dense = sorted(layers or [])
    if dense != list(range(len(dense))):
        raise ValueError("be the first layers, as ours are")
    return len(dense)


def _layers(count: Any, config: Any) -> list[int]:
    return list(range(count))


ARCHITECTURE = Architecture(
    model_type="qwen3_moe",
    class_name="Qwen3MoeForCausalLM",
    fields=(
        *FIELDS,
        norm_topk_prob(),
        Field("num_experts", "moe.num_experts", alias="num_local_experts"),
        Field("moe_intermediate_size", "moe.intermediate_size"),
        Field("intermediate_size", "model.intermediate_size"),
        Field("mlp_only_layers", "model.n_dense_layers", None, _first_layers, _layers),
    ),
    fixed={**FIXED, "model.qk_norm": (True,), "model.qk_norm_scope": ("head",)},
    only={
        **{key: only for key, only in ONLY.items() if key != "sliding_window"},
        "use_sliding_window": Only(False, ONLY["sliding_window"].reason),
        "decoder_sparse_step": Only(1, "every layer after the dense ones has experts"),
    },
    names={**NAMES, **DENSE_MLP},
)
