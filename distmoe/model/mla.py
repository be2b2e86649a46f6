"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), as it is trained.

    c_q = norm(x W_q_a^T),  [q_nope | q_rope] = c_q W_q_b^T     or, without a latent, x W_q^T
    [c_kv | k_rope] = x W_kv_a^T,  [k_nope | v] = norm(c_kv) W_kv_b^T
    q = [q_nope | turned q_rope],  k = [k_nope | turned k_rope]

A token has one k_rope, which all heads share. Keys and values are formed for every head: the form
that keeps latents alone, with W_kv_b drawn into other matrices, saves the memory of a cache, and
costs products in training.

Under context parallelism norm(c_kv) and the turned k_rope are gathered, and every rank forms all
keys and values of the sequence: products by W_kv_b C times, for far fewer bytes between the ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distmoe.comm.context import SequenceGather
from distmoe.config import ModelConfig
from distmoe.model.attention import AttentionSizes
from distmoe.model.causal_attention import AttentionMask, attend
from distmoe.model.norm import RMSNorm
from distmoe.model.rope import rotate_neighbours
from distmoe.model.yarn import score_scale

# Of the latents, in DeepSeek's code and in transformers, whatever rms_norm_eps is.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Names and layouts of the weights are those of DeepSeek: of a head's rows the nope part comes
    first, and RoPE turns neighbours."""

    def __init__(self, config: ModelConfig, gather: SequenceGather) -> None:
        super().__init__()
        self.gather = gather
        mla, H, A = config.mla, config.hidden_size, config.n_heads
        self.n_heads, self.q_lora_rank = A, mla.q_lora_rank
        self.score_scale = score_scale(config.yarn)
        self.q_parts = [mla.qk_nope_head_dim, mla.qk_rope_head_dim]
        self.kv_a_parts = [mla.kv_lora_rank, mla.qk_rope_head_dim]
        self.kv_b_parts = [mla.qk_nope_head_dim, mla.v_head_dim]
        if mla.q_lora_rank:
            self.q_a_proj = nn.Linear(H, mla.q_lora_rank, bias=False)
            self.q_a_norm = RMSNorm(mla.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(mla.q_lora_rank, A * sum(self.q_parts), bias=False)
        else:
            self.q_proj = nn.Linear(H, A * sum(self.q_parts), bias=False)
        self.kv_a_proj = nn.Linear(H, sum(self.kv_a_parts), bias=False)
        self.kv_a_norm = RMSNorm(mla.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(mla.kv_lora_rank, A * sum(self.kv_b_parts), bias=False)
        self.o_proj = nn.Linear(A * mla.v_head_dim, H, bias=False)

    @staticmethod
    def sizes(model: ModelConfig) -> AttentionSizes:
        """Of a resolved model."""
        mla, H, A = model.mla, model.hidden_size, model.n_heads
        rope, ranks = mla.qk_rope_head_dim, (mla.q_lora_rank, mla.kv_lora_rank)
        qk_dim = mla.qk_nope_head_dim + rope
        q, kv_b = A * qk_dim, A * (mla.qk_nope_head_dim + mla.v_head_dim)
        queries = ((ranks[0], H), (q, ranks[0])) if ranks[0] else ((q, H),)
        keys = ((ranks[1] + rope, H), (kv_b, ranks[1]))
        return AttentionSizes(
            matrices=(*queries, *keys, (H, A * mla.v_head_dim)),
            vectors=tuple(rank for rank in ranks if rank),
            heads=A,
            kv_heads=A,
            qk_dim=qk_dim,
            v_dim=mla.v_head_dim,
            rotary_dim=rope,
            normed=sum(ranks),
            latent=sum(ranks),
            turned=(A + 1) * rope,
            joined=2 * q,
            # v is a view of what W_kv_b gives; q and k are copies.
            held=2 * q + kv_b,
            gathered=ranks[1] + rope,
            after_gather=kv_b * ranks[1],
        )

    def forward(self, x_BSH: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask) -> Tensor:
        q_nope_BASX, q_rope_BASX = self._heads(self._queries(x_BSH), self.q_parts)
        latent_BSX, k_rope_BSX = torch.split(self.kv_a_proj(x_BSH), self.kv_a_parts, dim=-1)
        k_rope_BSX = rotate_neighbours(k_rope_BSX[:, None], cos, sin)[:, 0]
        latent_BSX, k_rope_BSX = self.gather(self.kv_a_norm(latent_BSX), k_rope_BSX)
        k_nope_BASX, v_BASX = self._heads(self.kv_b_proj(latent_BSX), self.kv_b_parts)
        k_rope_BASX = k_rope_BSX[:, None].expand(-1, self.n_heads, -1, -1)
        q_BASD = torch.cat([q_nope_BASX, rotate_neighbours(q_rope_BASX, cos, sin)], dim=-1)
        k_BASD = torch.cat([k_nope_BASX, k_rope_BASX], dim=-1)
        y_BASX = attend(q_BASD, k_BASD, v_BASX, mask, part=self.gather.part, scale=self.score_scale)
        out_BSH: Tensor = self.o_proj(y_BASX.transpose(1, 2).flatten(2))
        return out_BSH

    def _queries(self, x_BSH: Tensor) -> Tensor:
        q_BSX: Tensor = (
            self.q_b_proj(self.q_a_norm(self.q_a_proj(x_BSH)))
            if self.q_lora_rank
            else self.q_proj(x_BSH)
        )
        return q_BSX

    def _heads(self, x_BSX: Tensor, parts: list[int]) -> tuple[Tensor, Tensor]:
        """[B, S, heads * (one + other)] -> [B, heads, S, one] and [B, heads, S, other]."""
        x_BASX = x_BSX.view(*x_BSX.shape[:2], self.n_heads, sum(parts)).transpose(1, 2)
        one_BASX, other_BASX = torch.split(x_BASX, parts, dim=-1)
        return one_BASX, other_BASX
