"""Settings of the model but for its MoE layers: the section [model]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention, with model.attention = "mla". The defaults are DeepSeek-V3's,
    but for its q_lora_rank, 1536."""

    q_lora_rank: int = 0
    """Size of the latent that queries are made from. 0: they are one projection."""
    kv_lora_rank: int = 512
    """Size of the latent that keys and values are made from."""
    qk_nope_head_dim: int = 128
    """Values of a head's queries and keys without a position."""
    qk_rope_head_dim: int = 64
    """Values that RoPE turns; all heads have the same keys there."""
    v_head_dim: int = 128
    """Values of a head's value."""


@dataclass(frozen=True)
class YarnConfig:
    """RoPE for more positions than a model was trained with first (YaRN, arXiv 2309.00071)."""

    factor: float = 1.0
    """How many times as many positions. 1: RoPE as it is."""
    original_positions: int = 4096
    """Positions of the first training."""
    beta_fast: float = 32.0
    """Frequencies that turn more often over the original positions stay."""
    beta_slow: float = 1.0
    """Those that turn less often are divided by the factor."""
    mscale: float = 1.0
    """cos and sin are multiplied by m(mscale) / m(mscale_all_dim), m(s) = 1 + 0.1 s ln factor."""
    mscale_all_dim: float = 0.0
    """Scores are multiplied by the square of m(mscale_all_dim) (DeepSeek-V3: as mscale, 1)."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer; `moe` describes its experts."""

    vocab_size: int = 0
    """Rows of the embedding. 0: the size of the data set's tokenizer."""
    hidden_size: int = 256
    """H."""
    n_layers: int = 4
    """Blocks in all."""
    n_dense_layers: int = 1
    """The first blocks, which have a dense MLP instead of experts."""
    attention: str = "gqa"
    """gqa: grouped queries. mla: keys and values from a latent (DeepSeek-V2), with the sizes of
    model.mla; n_kv_heads, partial_rotary_factor, qkv_bias, qk_norm and clip_qkv are gqa's."""
    n_heads: int = 4
    """A, query heads."""
    n_kv_heads: int = 2
    """Key and value heads; divides n_heads."""
    head_dim: int = 0
    """D, of queries and keys. 0: hidden_size / n_heads, or with mla what its sizes make."""
    intermediate_size: int = 1024
    """Width of the dense MLP."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    partial_rotary_factor: float = 1.0
    """Share of a head, its first values, that RoPE turns (GLM-4.5: 0.5)."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    qkv_bias: bool = False
    """Biases of queries, keys and values (GLM-4.5)."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    qk_norm_scope: Literal["head", "projection"] = "head"
    """What qk_norm takes the mean over: each head by itself (Qwen3), or all heads of a projection
    (OLMoE)."""
    clip_qkv: float = 0.0
    """Largest absolute value of queries, keys and values, after qk_norm. 0: any."""
    tie_embeddings: bool = False
    """The output head is the embedding."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual outputs: divided by sqrt(2 n_layers)."""
    mla: MlaConfig = field(default_factory=MlaConfig)
    yarn: YarnConfig = field(default_factory=YarnConfig)
