"""Grouped-query attention (arXiv 2305.13245)."""

from __future__ import annotations

from torch import Tensor, nn

from distmoe.comm.context import SequenceGather
from distmoe.config import ModelConfig
from distmoe.model.attention import AttentionSizes
from distmoe.model.causal_attention import AttentionMask, attend
from distmoe.model.norm import RMSNorm
from distmoe.model.rope import rotate
from distmoe.model.yarn import score_scale


class GroupedQueryAttention(nn.Module):
    """With rotary positions and, optionally, biases and normed queries and keys, whose values, and
    those of v, are then clipped."""

    def __init__(self, config: ModelConfig, gather: SequenceGather) -> None:
        super().__init__()
        self.gather = gather
        self.head_dim = config.head_dim
        self.norms_heads = config.qk_norm_scope == "head"
        self.clip = config.clip_qkv
        self.score_scale = score_scale(config.yarn)
        heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_norm:
            q_size, k_size = (config.head_dim,) * 2 if self.norms_heads else (heads, kv_heads)
            self.q_norm = RMSNorm(q_size, eps=config.norm_eps)
            self.k_norm = RMSNorm(k_size, eps=config.norm_eps)

    @staticmethod
    def sizes(model: ModelConfig) -> AttentionSizes:
        """Of a resolved model."""
        H, D = model.hidden_size, model.head_dim
        q, kv = model.n_heads * D, model.n_kv_heads * D
        norms = (D, D) if model.qk_norm_scope == "head" else (q, kv)
        biases = (q, kv, kv) if model.qkv_bias else ()
        rotary_dim = round(D * model.partial_rotary_factor)
        return AttentionSizes(
            matrices=((q, H), (kv, H), (kv, H), (H, q)),
            vectors=(*biases, *(norms if model.qk_norm else ())),
            heads=model.n_heads,
            kv_heads=model.n_kv_heads,
            qk_dim=D,
            v_dim=D,
            rotary_dim=rotary_dim,
            normed=q + kv if model.qk_norm else 0,
            latent=0,
            turned=(model.n_heads + model.n_kv_heads) * rotary_dim,
            joined=q + kv if rotary_dim < D else 0,
            held=q + 2 * kv,
            gathered=2 * kv,
            after_gather=0,
        )

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask) -> Tensor:
        B, S, _ = x_BSH.shape
        q_BASD = self._heads(self.q_proj(x_BSH), self.q_norm)
        k_BASD = self._heads(self.k_proj(x_BSH), self.k_norm)
        v_BASD = self._heads(self.v_proj(x_BSH), None)
        q_BASD, k_BASD = rotate(q_BASD, cos, sin), rotate(k_BASD, cos, sin)
        k_BASD, v_BASD = self.gather(k_BASD, v_BASD)
        y_BASD = attend(q_BASD, k_BASD, v_BASD, mask, part=self.gather.part, scale=self.score_scale)
        out_BSH: Tensor = self.o_proj(y_BASD.transpose(1, 2).reshape(B, S, -1))
        return out_BSH

    def _heads(self, x_BSX: Tensor, norm: nn.Module | None) -> Tensor:
        """[B, S, heads * D] -> [B, heads, S, D], normed and clipped."""
        if norm is not None and not self.norms_heads:
            x_BSX = norm(x_BSX)
        x_BSAD = x_BSX.view(*x_BSX.shape[:2], -1, self.head_dim)
        if norm is not None and self.norms_heads:
            x_BSAD = norm(x_BSAD)
        if self.clip:
            x_BSAD = x_BSAD.clamp(-self.clip, self.clip)
        return x_BSAD.transpose(1, 2)
