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
    """The same as a BlockMask."""
    # It brings torch's compiler with it.
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (start_BS[b, q] <= k) & (k <= q)

    B, S = start_BS.shape
    return create_block_mask(visible, B, None, S, S, device=start_BS.device)


def attend(q_BASD: Tensor, k_BASD: Tensor, v_BASD: Tensor, mask: AttentionMask) -> Tensor:
    """q [B, A, S, D], k and v [B, A / any factor, S, D] -> y [B, A, S, D]."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(
            q_BASD, k_BASD, v_BASD, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    flex_attention = _flex_attention(compiled=q_BASD.is_cuda and not torch.compiler.is_compiling())
    y_BASD: Tensor = flex_attention(q_BASD, k_BASD, v_BASD, block_mask=mask, enable_gqa=True)
    return y_BASD


@cache
def _flex_attention(*, compiled: bool) -> Any:
    """Compiled by itself, unless it is a part of something that is: else it forms all scores. On a
    CPU torch has no backward of it, compiled or not."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
