"""Parameters and FLOPs of a model, from its config alone."""

from __future__ import annotations

from dataclasses import dataclass

from distmoe.config import Config


@dataclass(frozen=True)
class ParameterCounts:
    """``active``: parameters that a token passes; both include the embedding and the head."""

    total: int
    active: int
    embedding: int


def parameter_counts(config: Config) -> ParameterCounts:
    """Counts of a resolved config."""
    model, moe = config.model, config.moe
    H = model.hidden_size
    heads, kv_heads = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    attention = H * heads + 2 * H * kv_heads + heads * H
    attention += 2 * model.head_dim if model.qk_norm else 0
    expert = 3 * H * moe.intermediate_size
    shared = 3 * H * moe.shared_intermediate_size + moe.num_experts * H
    n_moe = model.n_layers - model.n_dense_layers
    common = model.n_layers * (attention + 2 * H) + H
    common += model.n_dense_layers * 3 * H * model.intermediate_size + n_moe * shared
    embedding = model.vocab_size * H
    common += embedding if model.tie_embeddings else 2 * embedding
    return ParameterCounts(
        total=common + n_moe * moe.num_experts * expert,
        active=common + n_moe * moe.top_k * expert,
        embedding=embedding,
    )


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward. ``causal`` counts the half of attention that is computed; ``palm``
    counts all of it, as the PaLM convention does (arXiv 2204.02311, appendix B)."""

    causal: int
    palm: int


def flops_per_token(config: Config) -> FlopsPerToken:
    """6 * active parameters, without the embedding look-up, + attention: 12 L A D S for the full
    square of scores and values, half of it for the causal part."""
    model = config.model
    counts = parameter_counts(config)
    look_up = 0 if model.tie_embeddings else counts.embedding
    dense = 6 * (counts.active - look_up)
    attention = 12 * model.n_layers * model.n_heads * model.head_dim * config.data.seq_len
    return FlopsPerToken(causal=dense + attention // 2, palm=dense + attention)
