"""Causal attention over whole sequences, or inside of the documents of a packed sequence.

    y_q = sum over k of softmax_k(q . k / sqrt(D)) v_k,   start_q <= k <= q

with start_q the position at which q's document begins, 0 where documents are not told apart. Rotary
positions need not restart: a score depends on the distance of q and k only.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries, and keys, of a block of a BlockMask.
BLOCK = 128

AttentionMask = Any
"""None: causal over the whole sequence. A bool tensor [B, 1, S, S]: what is seen. A BlockMask: the
same by blocks, for FlexAttention."""


def document_mask(start_BS: Tensor | None) -> AttentionMask:
    """What a batch may attend to, for all layers: None over whole sequences, else inside of
    documents. On CUDA as a BlockMask: FlexAttention skips blocks of other documents, and stores no
    mask of S x S."""
    if start_BS is None:
        return None
    return block_mask(start_BS) if start_BS.device.type == "cuda" else dense_mask(start_BS)


def dense_mask(start_BS: Tensor) -> Tensor:
    """[B, 1, S, S], true where a query (third axis) sees a key."""
    position_S = torch.arange(start_BS.shape[1], device=start_BS.device)
    # A key's document is the query's if it does not lie before its begin.
    inside_BSS = position_S >= start_BS[:, :, None]
    return (inside_BSS & (position_S <= position_S[:, None]))[:, None]


def block_mask(start_BS: Tensor) -> AttentionMask:
    """The same as a BlockMask, from blocks alone: torch's create_block_mask would form all S x S.

    ``start_BS`` rises along a row, so the first query of a block sees the earliest document of its
    block, and the last query the latest.
    """
    # It brings torch's compiler with it.
    from torch.nn.attention.flex_attention import BlockMask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start_BS[b, q] <= k) & (k <= q)

    S = start_BS.shape[1]
    first_N = torch.arange(0, S, BLOCK, device=start_BS.device)
    last_N = first_N + BLOCK - 1
    earliest_BN, latest_BN = start_BS[:, first_N], start_BS[:, last_N.clamp(max=S - 1)]
    # Some query of block i sees some key of block j; every query every key.
    seen_BNN = (first_N <= last_N[:, None]) & (last_N >= earliest_BN[:, :, None])
    whole_BNN = (last_N <= first_N[:, None]) & (first_N >= latest_BN[:, :, None])
    # A block that the end of the row cuts is never whole.
    complete_N = last_N < S
    whole_BNN &= complete_N & complete_N[:, None]
    return BlockMask.from_kv_blocks(
        *_block_lists(seen_BNN & ~whole_BNN),
        *_block_lists(whole_BNN),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(S, S),
    )


def _block_lists(mask_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """Of every row of blocks how many are there [B, 1, N], and these before the others
    [B, 1, N, N]."""
    order_BNN = mask_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return mask_BNN.sum(-1, dtype=torch.int32)[:, None], order_BNN.int()[:, None]


def attend(
    q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor, mask: AttentionMask, *, scale: float = 1.0
) -> Tensor:
    """q [B, A, S, D], k [B, A / any factor, S, D], v as k but with another D, if wanted -> y
    [B, A, S, D of v]. ``scale``: on the scores, beside 1 / sqrt(D).

    For values of another size torch has fused kernels on CUDA: cuDNN's on Hopper and newer for 192
    and 128, the sizes of DeepSeek, which torch 2.11 takes first if cuDNN is newer than 9.15 (its
    packages for CUDA 13 are) and run.deterministic is off; else the memory-efficient one. On a CPU
    it has none, and would form all scores; there v is padded.
    """
    scale /= q_BASD.shape[-1] ** 0.5
    if mask is None or isinstance(mask, Tensor):
        size = v_BASD.shape[-1]
        if size < q_BASD.shape[-1] and not q_BASD.is_cuda:
            v_BASD = F.pad(v_BASD, (0, q_BASD.shape[-1] - size))
        return F.scaled_dot_product_attention(
            q_BASD,
            k_BASD,
            v_BASD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=True,
        )[..., :size]
    flex_attention = _flex_attention(compiled=q_BASD.is_cuda and not torch.compiler.is_compiling())
    y_BASD: Tensor = flex_attention(
        q_BASD, k_BASD, v_BASD, block_mask=mask, scale=scale, enable_gqa=True
    )
    return y_BASD


@cache
def _flex_attention(*, compiled: bool) -> Any:
    """Compiled by itself, unless it is a part of something that is: else it forms all scores. On a
    CPU torch has no backward of it, compiled or not."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
